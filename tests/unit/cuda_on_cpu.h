// Enough of CUDA for kernels.cu to run on a CPU, in fp32: the threads of a block take turns, from one __syncthreads() to
// the next, and blocks run one after the other. Included before kernels.cu; RUN(name) exports a kernel.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define FP32
#define __global__
#define __device__
#define __shared__ thread_local  // as static, but it may stand behind extern; there is one thread of the system
#define __launch_bounds__(...)

using std::min;

struct Index { unsigned x, y, z; };
struct float2 { float x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }

static Index blockIdx, threadIdx, blockDim, gridDim;
thread_local float shared[1 << 16];  // what a launch asks for as shared memory

namespace cuda_on_cpu {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Index index;
  bool is_done = false;
};

static std::vector<Thread> threads;
static std::vector<float> exchanged;  // by the lanes of warps
static ucontext_t scheduler;
static int current;
static std::function<void()> kernel;

static void enter() {
  kernel();
  threads[current].is_done = true;
}

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static void run_block() {
  for (Thread& thread : threads) {
    thread.is_done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  for (bool is_any_left = true; is_any_left;) {
    is_any_left = false;
    for (current = 0; current < (int)threads.size(); ++current) {
      if (threads[current].is_done) continue;
      threadIdx = threads[current].index;
      swapcontext(&scheduler, &threads[current].context);
      is_any_left |= !threads[current].is_done;
    }
  }
}

template <class... Arguments>
void launch(void (*function)(Arguments...), const int* grid, const int* block, void** pointers) {
  gridDim = {grid[0], grid[1], 1};
  blockDim = {block[0], block[1], 1};
  threads = std::vector<Thread>(block[0] * block[1]);
  exchanged.assign(threads.size(), 0.f);
  for (int i = 0; i < (int)threads.size(); ++i) threads[i].index = {i % block[0], i / block[0], 0};
  kernel = [&] {
    [&]<size_t... I>(std::index_sequence<I...>) {
      function(*reinterpret_cast<std::remove_reference_t<Arguments>*>(pointers[I])...);
    }(std::index_sequence_for<Arguments...>{});
  };
  for (int y = 0; y < grid[1]; ++y)
    for (int x = 0; x < grid[0]; ++x) {
      blockIdx = {x, y, 0};
      run_block();
    }
}

}  // namespace cuda_on_cpu

static void __syncthreads() { cuda_on_cpu::yield(); }
static void __threadfence() {}

static float __shfl_xor_sync(unsigned, float x, int offset) {
  cuda_on_cpu::exchanged[cuda_on_cpu::current] = x;
  cuda_on_cpu::yield();
  float found = cuda_on_cpu::exchanged[cuda_on_cpu::current ^ offset];
  cuda_on_cpu::yield();  // before another value takes its place
  return found;
}

static unsigned atomicAdd(unsigned* number, unsigned more) { return std::exchange(*number, *number + more); }
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
#define __expf(x) std::exp(x)  // glibc has a function of CUDA's name
#define __fdividef(x, y) ((x) / (y))

#define RUN(name)                                                                       \
  extern "C" void run_##name(const int* grid, const int* block, void** pointers) {      \
    cuda_on_cpu::launch(name, grid, block, pointers);                                   \
  }
