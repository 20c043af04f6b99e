// The elementwise and normalizing passes of the UNet's training step, each reading and writing its tensors once.
//
// Tensors are rows of channels: (rows, width) for the transformer blocks, (N, H*W, C) for convolutions in channels_last.
// Widths are multiples of 8, so that a thread moves 8 neighbours at once. Storage is fp16, bf16 or fp32, chosen by one
// of the macros FP16, BF16 and FP32; arithmetic is fp32. No result depends on the order in which blocks run. No header
// is included, so that compiling needs no CUDA toolkit.

#if defined(FP16)
typedef unsigned short word;
__device__ float widen(word w) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(w)); return f; }
__device__ word narrow(float f) { word w; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(w) : "f"(f)); return w; }
#elif defined(BF16)
typedef unsigned short word;
__device__ float widen(word w) { return __uint_as_float((unsigned)w << 16); }
__device__ word narrow(float f) {
  unsigned bits = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return (word)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
#elif defined(FP32)
typedef float word;
__device__ float widen(word w) { return w; }
__device__ word narrow(float f) { return f; }
#endif

struct alignas(16) Pack { word at[8]; };

__device__ Pack load(const word* from) { return *reinterpret_cast<const Pack*>(from); }
__device__ void store(word* to, const Pack& pack) { *reinterpret_cast<Pack*>(to) = pack; }

// CUDA's exact expf, erff and division take longer than these passes wait for the bus, so tensors of 16 bits, which keep
// three digits, are computed with the fast instructions. A test on a CPU asks for that with fp32.
#if !defined(FP32)
#define AS_16_BITS
#endif
#if defined(AS_16_BITS)
__device__ float exponential(float x) { return __expf(x); }
__device__ float quotient(float x, float y) { return __fdividef(x, y); }
#else
__device__ float exponential(float x) { return expf(x); }
__device__ float quotient(float x, float y) { return x / y; }
#endif

__device__ float sigmoid(float x) { return quotient(1.f, 1.f + exponential(-x)); }

// The standard normal distribution: its density at x, and the share of it that lies below x.
struct Normal {
  float density, below;
  __device__ explicit Normal(float x) : density(0.39894228040143268f * exponential(-0.5f * x * x)) {
#if defined(AS_16_BITS)
    // To an absolute error of 7.5e-8. Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17.
    float t = quotient(1.f, 1.f + 0.2316419f * fabsf(x));
    float sum = 1.330274429f * t - 1.821255978f;
    sum = ((sum * t + 1.781477937f) * t - 0.356563782f) * t + 0.319381530f;
    float tail = density * sum * t;
    below = x < 0.f ? tail : 1.f - tail;
#else
    below = 0.5f * erfcf(-0.70710678118654752f * x);
#endif
  }
};

// A thread's pack of a tensor of rows of `width`, and where in it the pack is. What launches this sees to it that 32 bits
// count the packs: indexes of 64 take longer to divide than the rest of a pass takes.
struct Place {
  unsigned pack, row, column;  // column: of the pack's first number
  __device__ explicit Place(int width) : pack(blockIdx.x * blockDim.x + threadIdx.x) {
    unsigned packs = width / 8;
    row = pack / packs;
    column = (pack - row * packs) * 8;
  }
};

// Says whether this block is the last of those with its blockIdx.y that comes here: it sees what all of them wrote.
__device__ bool is_last_block(unsigned* counters) {
  bool is_first_thread = threadIdx.x == 0 && threadIdx.y == 0;
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (is_first_thread) is_last = atomicAdd(&counters[blockIdx.y], 1u) == gridDim.x - 1;
  __syncthreads();
  if (is_last && is_first_thread) counters[blockIdx.y] = 0;  // ready for the next launch
  __threadfence();
  return is_last;
}

// --- GEGLU: y = value * gelu(gate), where h holds (value, gate) side by side, each `width` wide ---

extern "C" __global__ void geglu_forward(const word* h, word* y, unsigned packs, int width) {
  Place place(width);
  if (place.pack >= packs) return;
  const word* from = h + (long long)place.row * 2 * width + place.column;
  Pack value = load(from), gate = load(from + width);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x = widen(gate.at[i]);
    value.at[i] = narrow(widen(value.at[i]) * x * Normal(x).below);
  }
  store(y + (long long)place.pack * 8, value);
}

extern "C" __global__ void geglu_backward(const word* h, const word* grad_y, word* grad_h, unsigned packs, int width) {
  Place place(width);
  if (place.pack >= packs) return;
  long long start = (long long)place.row * 2 * width + place.column;
  Pack value = load(h + start), gate = load(h + start + width), grad = load(grad_y + (long long)place.pack * 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x = widen(gate.at[i]), g = widen(grad.at[i]);
    Normal normal(x);
    gate.at[i] = narrow(g * widen(value.at[i]) * (normal.below + x * normal.density));
    value.at[i] = narrow(g * x * normal.below);
  }
  store(grad_h + start, value);
  store(grad_h + start + width, gate);
}

// --- residual add and LayerNorm: sum = x + delta, y = norm(sum); a warp for each row ---

#define LANES 32

__device__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// A lane's share of a row: up to PACKS packs, LANES apart, kept as they are stored: 16 bits as floats would take twice the
// registers, and so leave room for half the warps. A pass fetches what it sums before it writes any: what is read after a
// write waits for it, since they might overlap.
template <int PACKS>
struct Row {
  Pack at[PACKS];
  int lane, width;
  __device__ explicit Row(int width) : lane(threadIdx.x), width(width) {}

  __device__ void fetch(const word* from) {
    each_pack([&](int k, int column) { at[k] = load(from + column); });
  }
  template <class F>
  __device__ void each_pack(F f) const {
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if ((k * LANES + lane) * 8 < width) f(k, (k * LANES + lane) * 8);
  }
  // Returns the row's mean and 1 / standard deviation.
  __device__ float2 statistics(float eps) const {
    float total = 0.f, squares = 0.f;
    each_pack([&](int k, int) {
#pragma unroll
      for (int i = 0; i < 8; ++i) total += widen(at[k].at[i]);
    });
    float mean = warp_sum(total) / width;
    each_pack([&](int k, int) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float centered = widen(at[k].at[i]) - mean;
        squares += centered * centered;
      }
    });
    return make_float2(mean, rsqrtf(warp_sum(squares) / width + eps));
  }
};

// delta may be null; then sum is not written, for it is x. statistics (rows): mean and 1 / standard deviation.
template <int PACKS>
__device__ void add_layer_norm(const word* x, const word* delta, const word* weight, const word* bias, word* sum,
                               word* y, float2* statistics, int rows, int width, float eps) {
  int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  long long start = (long long)row * width;
  Row<PACKS> values(width), more(width), gain(width), offset(width);
  values.fetch(x + start);
  if (delta) {
    more.fetch(delta + start);
    values.each_pack([&](int k, int column) {
      Pack& pack = values.at[k];
#pragma unroll
      for (int i = 0; i < 8; ++i) pack.at[i] = narrow(widen(pack.at[i]) + widen(more.at[k].at[i]));
      store(sum + start + column, pack);
    });
  }
  float2 of = values.statistics(eps);
  if (values.lane == 0) statistics[row] = of;
  gain.fetch(weight);
  offset.fetch(bias);
  values.each_pack([&](int k, int column) {
    Pack out;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = (widen(values.at[k].at[i]) - of.x) * of.y;
      out.at[i] = narrow(value * widen(gain.at[k].at[i]) + widen(offset.at[k].at[i]));
    }
    store(y + start + column, out);
  });
}

// grad_sum, the gradient that reaches the sum past the norm, may be null.
template <int PACKS>
__device__ void layer_norm_grad(const word* sum, const word* weight, const float2* statistics, const word* grad_y,
                                const word* grad_sum, word* grad_x, int rows, int width) {
  int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  long long start = (long long)row * width;
  Row<PACKS> values(width), grads(width), gain(width), past(width);
  values.fetch(sum + start);
  grads.fetch(grad_y + start);
  gain.fetch(weight);
  if (grad_sum) past.fetch(grad_sum + start);
  float2 of = statistics[row];
  float mean_grad = 0.f, mean_product = 0.f;
  values.each_pack([&](int k, int) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float grad = widen(grads.at[k].at[i]) * widen(gain.at[k].at[i]);
      mean_grad += grad;
      mean_product += grad * ((widen(values.at[k].at[i]) - of.x) * of.y);
    }
  });
  mean_grad = warp_sum(mean_grad) / width;
  mean_product = warp_sum(mean_product) / width;
  values.each_pack([&](int k, int column) {
    Pack out;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = (widen(values.at[k].at[i]) - of.x) * of.y;
      float grad = widen(grads.at[k].at[i]) * widen(gain.at[k].at[i]);
      grad = of.y * (grad - mean_grad - value * mean_product);
      out.at[i] = narrow(grad_sum ? grad + widen(past.at[k].at[i]) : grad);
    }
    store(grad_x + start + column, out);
  });
}

#define LAYER_NORM(PACKS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(128) add_layer_norm_##PACKS(                                            \
      const word* x, const word* delta, const word* weight, const word* bias, word* sum, word* y, float2* statistics,  \
      int rows, int width, float eps) {                                                                                \
    add_layer_norm<PACKS>(x, delta, weight, bias, sum, y, statistics, rows, width, eps);                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128) layer_norm_backward_##PACKS(                                       \
      const word* sum, const word* weight, const float2* statistics, const word* grad_y, const word* grad_sum,         \
      word* grad_x, int rows, int width) {                                                                             \
    layer_norm_grad<PACKS>(sum, weight, statistics, grad_y, grad_sum, grad_x, rows, width);                            \
  }

LAYER_NORM(3)  // widths up to 768, SDXL's 640 among them
LAYER_NORM(5)  // up to 1280
LAYER_NORM(8)  // up to 2048

// --- GroupNorm and SiLU in channels_last: y = silu(norm(x + shift)); shift is (N, C) or null, silu is optional ---
//
// x may lie in two tensors, x of the first `split` channels and skip of the others; else skip is null, and split all.
//
// A block is (C / 8, some rows) threads, 512 at most, and takes `rows_per_block` pixels of picture blockIdx.y. The first
// pass of each direction sums two numbers over every group, the second uses them.

// A thread's 8 channels of the block's picture, in whichever tensor they are; null where that one is.
template <class Word>
struct Part {
  Word* start;
  long long size;  // channels of a pixel there
  __device__ Word* at(int pixel) const { return start + pixel * size; }
};

struct Slice {
  int channel, first, end;  // this thread's first channel; the block's pixels
  int pixels, channels;
  __device__ Slice(int pixels, int channels, int rows_per_block)
      : channel(threadIdx.x * 8),
        first(blockIdx.x * rows_per_block),
        end(min(pixels, (int)(blockIdx.x + 1) * rows_per_block)),
        pixels(pixels),
        channels(channels) {}
  template <class Word>
  __device__ Part<Word> of(Word* x, Word* skip, int split) const {
    bool is_skip = channel >= split;
    Word* tensor = is_skip ? skip : x;
    long long size = is_skip ? channels - split : split;
    return {tensor ? tensor + blockIdx.y * pixels * size + channel - (is_skip ? split : 0) : nullptr, size};
  }
  template <class Word>
  __device__ Part<Word> of(Word* x) const {
    return of<Word>(x, nullptr, channels);
  }
  // Calls use(pixel, fetch(pixel)) for this thread's pixels, some of them fetched before the first is used: few warps fit
  // next to each other, and would leave the bus waiting otherwise. Half as many of 32 bits are as much.
  template <int AHEAD_OF_16_BITS, class Fetch, class Use>
  __device__ void each_pixel(Fetch fetch, Use use) const {
#if defined(AS_16_BITS)
    constexpr int AHEAD = AHEAD_OF_16_BITS;
#else
    constexpr int AHEAD = AHEAD_OF_16_BITS / 2;
#endif
    for (int start = first + threadIdx.y; start < end; start += AHEAD * blockDim.y) {
      decltype(fetch(0)) fetched[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k)
        if (start + k * (int)blockDim.y < end) fetched[k] = fetch(start + k * blockDim.y);
#pragma unroll
      for (int k = 0; k < AHEAD; ++k)
        if (start + k * (int)blockDim.y < end) use(start + k * blockDim.y, fetched[k]);
    }
  }
};

__device__ void load_shift(float (&shift)[8], const word* from, int channels, int channel) {
  Pack pack;
  if (from) pack = load(from + (long long)blockIdx.y * channels + channel);
#pragma unroll
  for (int i = 0; i < 8; ++i) shift[i] = from ? widen(pack.at[i]) : 0.f;
}

// Sums each thread's 8 + 8 numbers over the groups of the block, then, in the last block of a picture, over the blocks.
// Returns true there, with the totals in `totals` (groups, 2), in shared memory.
__device__ bool sum_over_groups(const float (&a)[8], const float (&b)[8], float* partial, unsigned* counters,
                                float* shared, int channels, int groups, float*& totals) {
  int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  float* first = shared;
  float* second = shared + blockDim.y * channels;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    first[threadIdx.y * channels + threadIdx.x * 8 + i] = a[i];
    second[threadIdx.y * channels + threadIdx.x * 8 + i] = b[i];
  }
  __syncthreads();
  for (int channel = thread; channel < channels; channel += threads)
    for (int row = 1; row < blockDim.y; ++row) {
      first[channel] += first[row * channels + channel];
      second[channel] += second[row * channels + channel];
    }
  __syncthreads();
  float* mine = partial + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * groups * 2;
  for (int group = thread; group < groups; group += threads) {
    float sum_a = 0.f, sum_b = 0.f;
    for (int channel = group * (channels / groups); channel < (group + 1) * (channels / groups); ++channel) {
      sum_a += first[channel];
      sum_b += second[channel];
    }
    mine[group * 2] = sum_a;
    mine[group * 2 + 1] = sum_b;
  }
  if (!is_last_block(counters)) return false;
  totals = shared;
  const volatile float* all = partial + (long long)blockIdx.y * gridDim.x * groups * 2;
  for (int number = thread; number < groups * 2; number += threads) {
    double total = 0.;
    for (int block = 0; block < gridDim.x; ++block) total += all[(long long)block * groups * 2 + number];
    totals[number] = (float)total;
  }
  __syncthreads();
  return true;
}

// statistics (N, groups, 2): mean and 1 / standard deviation.
extern "C" __global__ void __launch_bounds__(512) group_norm_statistics(
    const word* x, const word* skip, int split, const word* shift_from, float* partial, unsigned* counters,
    float* statistics, int pixels, int channels, int groups, int rows_per_block, float eps) {
  extern __shared__ float shared[];
  Slice slice(pixels, channels, rows_per_block);
  Part<const word> from = slice.of(x, skip, split);
  float shift[8], sums[8] = {}, squares[8] = {};
  load_shift(shift, shift_from, channels, slice.channel);
  auto fetch = [&](int pixel) { return load(from.at(pixel)); };
  slice.each_pixel<4>(fetch, [&](int, const Pack& pack) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = widen(pack.at[i]) + shift[i];
      sums[i] += value;
      squares[i] += value * value;
    }
  });
  float* totals;
  if (!sum_over_groups(sums, squares, partial, counters, shared, channels, groups, totals)) return;
  int thread = threadIdx.y * blockDim.x + threadIdx.x;
  double count = (double)pixels * (channels / groups);
  for (int group = thread; group < groups; group += blockDim.x * blockDim.y) {
    double mean = totals[group * 2] / count, variance = totals[group * 2 + 1] / count - mean * mean;
    float* out = statistics + ((long long)blockIdx.y * groups + group) * 2;
    out[0] = (float)mean;
    out[1] = (float)(1. / sqrt((variance > 0. ? variance : 0.) + (double)eps));
  }
}

// What a thread needs of its 8 channels. A pass uses few of these numbers: with 64 registers or fewer, as the forward one
// has, a multiprocessor takes two blocks.
struct Channels {
  float scale[8], offset[8];  // the norm's output is x * scale + offset
  float center[8];            // of x: the mean less the shift
  float rstd[8], weight[8];
  __device__ Channels(const float* statistics, const word* weights, const word* biases, const word* shift_from,
                      int channels, int groups, int channel) {
    Pack gain = load(weights + channel), bias = load(biases + channel);
    float shift[8];
    load_shift(shift, shift_from, channels, channel);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* of = statistics + ((long long)blockIdx.y * groups + (channel + i) / (channels / groups)) * 2;
      center[i] = of[0] - shift[i];
      rstd[i] = of[1];
      weight[i] = widen(gain.at[i]);
      scale[i] = rstd[i] * weight[i];
      offset[i] = widen(bias.at[i]) - center[i] * scale[i];
    }
  }
  __device__ float output(int i, word x) const { return widen(x) * scale[i] + offset[i]; }
  // The gradient of the norm's output, given that of what the SiLU, if there is one, makes of it.
  __device__ float output_grad(int i, word x, word grad_y, int silu) const {
    float z = output(i, x), s = sigmoid(z);
    return widen(grad_y) * (silu ? s * (1.f + z * (1.f - s)) : 1.f);
  }
};

extern "C" __global__ void __launch_bounds__(512) group_norm_forward(
    const word* x, const word* skip, int split, const word* shift, const float* statistics, const word* weight,
    const word* bias, word* y, int pixels, int channels, int groups, int rows_per_block, int silu) {
  Slice slice(pixels, channels, rows_per_block);
  Part<const word> from = slice.of(x, skip, split);
  Part<word> to = slice.of(y);
  Channels of(statistics, weight, bias, shift, channels, groups, slice.channel);
  auto fetch = [&](int pixel) { return load(from.at(pixel)); };
  slice.each_pixel<2>(fetch, [&](int pixel, Pack& pack) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float z = of.output(i, pack.at[i]);
      pack.at[i] = narrow(silu ? z * sigmoid(z) : z);
    }
    store(to.at(pixel), pack);
  });
}

// means (N, groups, 2): of the gradient, and of its product with the normalized values.
extern "C" __global__ void __launch_bounds__(512) group_norm_backward_means(
    const word* x, const word* skip, int split, const word* shift, const float* statistics, const word* weight,
    const word* bias, const word* grad_y, float* partial, unsigned* counters, float* means, int pixels, int channels,
    int groups, int rows_per_block, int silu) {
  extern __shared__ float shared[];
  Slice slice(pixels, channels, rows_per_block);
  Part<const word> from = slice.of(x, skip, split), from_grad = slice.of(grad_y);
  Channels of(statistics, weight, bias, shift, channels, groups, slice.channel);
  float sums[8] = {}, products[8] = {};
  struct Fetched { Pack x, grad; };
  auto fetch = [&](int pixel) { return Fetched{load(from.at(pixel)), load(from_grad.at(pixel))}; };
  slice.each_pixel<2>(fetch, [&](int, const Fetched& fetched) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float g = of.output_grad(i, fetched.x.at[i], fetched.grad.at[i], silu);
      sums[i] += g;
      products[i] += g * (widen(fetched.x.at[i]) - of.center[i]);
    }
  });
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sums[i] *= of.weight[i];
    products[i] *= of.scale[i];
  }
  float* totals;
  if (!sum_over_groups(sums, products, partial, counters, shared, channels, groups, totals)) return;
  int thread = threadIdx.y * blockDim.x + threadIdx.x;
  double count = (double)pixels * (channels / groups);
  for (int number = thread; number < groups * 2; number += blockDim.x * blockDim.y)
    means[(long long)blockIdx.y * groups * 2 + number] = (float)(totals[number] / count);
}

// What reaches x and skip past the norm, past_x and past_skip, may be null.
extern "C" __global__ void __launch_bounds__(512) group_norm_backward(
    const word* x, const word* skip, int split, const word* shift, const float* statistics, const word* weight,
    const word* bias, const word* grad_y, const float* means, const word* past_x, const word* past_skip,
    word* grad_x, word* grad_skip, int pixels, int channels, int groups, int rows_per_block, int silu) {
  Slice slice(pixels, channels, rows_per_block);
  Part<const word> from = slice.of(x, skip, split), from_grad = slice.of(grad_y);
  Part<const word> past = slice.of(past_x, past_skip, split);
  Part<word> to = slice.of(grad_x, grad_skip, split);
  Channels of(statistics, weight, bias, shift, channels, groups, slice.channel);
  float constant[8], slope[8];  // of what the means take off, as a line over x
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* mean = means + ((long long)blockIdx.y * groups + (slice.channel + i) / (channels / groups)) * 2;
    slope[i] = of.rstd[i] * of.rstd[i] * mean[1];
    constant[i] = of.rstd[i] * mean[0] - of.center[i] * slope[i];
  }
  struct Fetched { Pack x, grad, past; };
  auto fetch = [&](int pixel) {
    return Fetched{load(from.at(pixel)), load(from_grad.at(pixel)), past.start ? load(past.at(pixel)) : Pack{}};
  };
  slice.each_pixel<2>(fetch, [&](int pixel, Fetched& fetched) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      word x = fetched.x.at[i];
      float g = of.output_grad(i, x, fetched.grad.at[i], silu) * of.scale[i];
      g -= constant[i] + slope[i] * widen(x);
      fetched.x.at[i] = narrow(past.start ? g + widen(fetched.past.at[i]) : g);
    }
    store(to.at(pixel), fetched.x);
  });
}

// --- the end of a residual block: y = x + h + bias, over (rows, width); x may be null, and y may be h ---

extern "C" __global__ void add_with_bias(const word* x, const word* h, const word* bias, word* y, unsigned packs,
                                         int width) {
  Place place(width);
  if (place.pack >= packs) return;
  long long start = (long long)place.pack * 8;
  Pack left, right = load(h + start), offset = load(bias + place.column);
  if (x) left = load(x + start);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = widen(right.at[i]) + widen(offset.at[i]);
    right.at[i] = narrow(x ? widen(left.at[i]) + sum : sum);
  }
  store(y + start, right);
}

// --- twice as many pixels each way: x (N, height, width, C), y (N, 2 height, 2 width, C); a pack of x for each thread ---

struct Fourfold {
  Place place;        // in x
  long long first;    // of the four pixels of y that a pixel of x becomes, where the upper left one's channels begin
  long long row;      // words of a row of y
  int channels;
  __device__ Fourfold(int width, int channels) : place(channels), row(2LL * width * channels), channels(channels) {
    unsigned from = place.row / width;  // rows of all pictures follow one another, in x as in y
    first = from * 2 * row + (place.row - from * width) * 2LL * channels + place.column;
  }
  __device__ long long at(int i) const { return first + i / 2 * row + i % 2 * channels; }
};

extern "C" __global__ void upsample_forward(const word* x, word* y, unsigned packs, int width, int channels) {
  Fourfold to(width, channels);
  if (to.place.pack >= packs) return;
  Pack value = load(x + (long long)to.place.pack * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) store(y + to.at(i), value);
}

extern "C" __global__ void upsample_backward(const word* grad_y, word* grad_x, unsigned packs, int width, int channels) {
  Fourfold from(width, channels);
  if (from.place.pack >= packs) return;
  float sums[8] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pack grad = load(grad_y + from.at(i));
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[k] += widen(grad.at[k]);
  }
  Pack out;
#pragma unroll
  for (int k = 0; k < 8; ++k) out.at[k] = narrow(sums[k]);
  store(grad_x + (long long)from.place.pack * 8, out);
}
