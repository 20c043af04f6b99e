// Enough of CUDA for the kernels to run on a CPU, in fp32, or in bf16 where BF16 is defined. Blocks run one after the
// other, and so do the warps of a block: each until it is done or waits at a barrier, the first warp first or, where
// LAST_WARP_FIRST is defined, the last, so that a barrier that is missing within a block is a wrong result in one of the
// two; what blocks tell each other would be wrong on a card alone. The threads of a warp take turns. Included before
// kernels.cu; RUN(name) exports a kernel.

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define ON_CPU
#if defined(BF16)
#define __CUDA_ARCH__ 900
#else
#define FP32
#endif
#define __global__
#define __device__
#define __shared__ thread_local  // as static, but it may stand behind extern; there is one thread of the system
#define __launch_bounds__(...)

using std::min;

struct Index { unsigned x, y, z; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
static unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

static Index blockIdx, threadIdx, blockDim, gridDim;
thread_local float shared[1 << 16];  // what a launch asks for as shared memory

namespace cuda_on_cpu {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Index index;
  bool is_done = false, is_waiting = false;  // for the others, at a __syncthreads()
  bool can_run() const { return !is_done && !is_waiting; }
};

static std::vector<Thread> threads;
struct Operands { unsigned a[4], b[2]; };
static std::vector<float> exchanged;  // by the lanes of warps
static std::vector<Operands> operands;  // of the lanes' product
static std::vector<const unsigned short*> rows;  // of matrices, which the lanes point at
static ucontext_t scheduler;
static int current;
static std::function<void()> kernel;

static void enter() {
  kernel();
  threads[current].is_done = true;
}

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static void run_warp(int first) {
  int beyond = std::min<int>(first + 32, threads.size());
  for (bool can_any_run = true; can_any_run;) {
    can_any_run = false;
    for (current = first; current < beyond; ++current) {
      if (!threads[current].can_run()) continue;
      threadIdx = threads[current].index;
      swapcontext(&scheduler, &threads[current].context);
      can_any_run |= threads[current].can_run();
    }
  }
}

static void run_block() {
  for (Thread& thread : threads) {
    thread.is_done = thread.is_waiting = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  auto is_done = [](const Thread& thread) { return thread.is_done; };
  while (!std::all_of(threads.begin(), threads.end(), is_done)) {
    for (Thread& thread : threads) thread.is_waiting = false;
    int warps = (threads.size() + 31) / 32;
    for (int i = 0; i < warps; ++i) {
#if defined(LAST_WARP_FIRST)
      run_warp((warps - 1 - i) * 32);
#else
      run_warp(i * 32);
#endif
    }
  }
}

template <class... Arguments>
void launch(void (*function)(Arguments...), const int* grid, const int* block, void** pointers) {
  gridDim = {grid[0], grid[1], 1};
  blockDim = {block[0], block[1], 1};
  threads = std::vector<Thread>(block[0] * block[1]);
  exchanged.assign(threads.size(), 0.f);
  operands.assign(threads.size(), {});
  rows.assign(threads.size(), nullptr);
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

static void __syncthreads() {
  cuda_on_cpu::threads[cuda_on_cpu::current].is_waiting = true;
  cuda_on_cpu::yield();
}
static void __threadfence() {}

static float __shfl_xor_sync(unsigned, float x, int offset) {
  cuda_on_cpu::exchanged[cuda_on_cpu::current] = x;
  cuda_on_cpu::yield();
  float found = cuda_on_cpu::exchanged[cuda_on_cpu::current ^ offset];
  cuda_on_cpu::yield();  // before another value takes its place
  return found;
}

// What the lanes' fragments are, tensor_cores.cu says.
static void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  using cuda_on_cpu::operands;
  auto word = [](unsigned pair, int at) { return __uint_as_float(at % 2 ? pair & 0xffff0000u : pair << 16); };
  int warp = cuda_on_cpu::current / 32 * 32, lane = cuda_on_cpu::current % 32;
  operands[warp + lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_on_cpu::yield();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const auto& of_row = operands[warp + lane / 4 * 4 + k % 8 / 2];
      const auto& of_column = operands[warp + (lane % 4 * 2 + i % 2) * 4 + k % 8 / 2];
      sum[i] += word(of_row.a[i / 2 + k / 8 * 2], k) * word(of_column.b[k / 8], k);
    }
  cuda_on_cpu::yield();
}

static unsigned pair(float first, float second) {
  auto bits = [](float x) -> unsigned {  // to nearest, ties to even
    unsigned of = __float_as_uint(x);
    return x != x ? 0x7fff : (of + 0x7fff + (of >> 16 & 1)) >> 16;
  };
  return bits(first) | bits(second) << 16;
}

static float2 unpair(unsigned words) { return {__uint_as_float(words << 16), __uint_as_float(words & 0xffff0000u)}; }
static float power_of_2(float x) { return std::exp2(x); }

static void load(unsigned (&to)[4], const void* from, bool transposed) {
  int warp = cuda_on_cpu::current / 32 * 32, lane = cuda_on_cpu::current % 32;
  cuda_on_cpu::rows[warp + lane] = static_cast<const unsigned short*>(from);
  cuda_on_cpu::yield();
  for (int matrix = 0; matrix < 4; ++matrix) {
    auto at = [&](int row, int column) -> unsigned { return cuda_on_cpu::rows[warp + matrix * 8 + row][column]; };
    int one = lane / 4, two = lane % 4 * 2;
    to[matrix] = transposed ? at(two, one) | at(two + 1, one) << 16 : at(one, two) | at(one, two + 1) << 16;
  }
  cuda_on_cpu::yield();
}
static void load_matrices(unsigned (&to)[4], const void* from) { load(to, from, false); }
static void load_transposed(unsigned (&to)[4], const void* from) { load(to, from, true); }

static unsigned atomicAdd(unsigned* number, unsigned more) { return std::exchange(*number, *number + more); }
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
#define __expf(x) std::exp(x)  // glibc has a function of CUDA's name
#define __fdividef(x, y) ((x) / (y))

#define RUN(name)                                                                       \
  extern "C" void run_##name(const int* grid, const int* block, void** pointers) {      \
    cuda_on_cpu::launch(name, grid, block, pointers);                                   \
  }
