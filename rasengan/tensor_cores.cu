// Products of the UNet's training step that libraries are slower at: gradients of the LoRA's matrices, and the attention to
// a prompt. On tensor cores, a T4's too. Follows kernels.cu, whose words and packs it uses; nothing where the card has no
// product of such words.

#if (defined(FP16) && __CUDA_ARCH__ >= 750) || (defined(BF16) && __CUDA_ARCH__ >= 800)

// Fragments of a warp, as the tensor cores take them. Lane 4 g + t holds of a matrix (16 x 16) the rows g and g + 8, and
// of each the columns 2 t, 2 t + 1 and then 2 t + 8, 2 t + 9: a[0], a[1], and a[2], a[3]. Of (16 x 8), b[0] and b[1],
// the column g, and of a sum (16 x 8) the columns 2 t and 2 t + 1 of the rows g and g + 8. A test on a CPU has its own.
#if !defined(ON_CPU)

#if defined(FP16)
#define MMA(SHAPE) "mma.sync.aligned." SHAPE ".row.col.f32.f16.f16.f32"
#else
#define MMA(SHAPE) "mma.sync.aligned." SHAPE ".row.col.f32.bf16.bf16.f32"
#endif

// sum += a b
__device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm(MMA("m16n8k16") " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm(MMA("m16n8k8") " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm(MMA("m16n8k8") " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Loads four matrices (8 x 8) from shared memory; lanes 8 k to 8 k + 7 point at the rows of the k-th.
__device__ void load_matrices(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((unsigned)__cvta_generic_to_shared(from)));
}

// The same, each transposed.
__device__ void load_transposed(unsigned (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((unsigned)__cvta_generic_to_shared(from)));
}

__device__ float power_of_2(float x) { asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)); return x; }

// Two numbers as two words, the first in the lower one.
__device__ unsigned pair(float first, float second) {
#if __CUDA_ARCH__ < 800
  return narrow(first) | (unsigned)narrow(second) << 16;
#else
  unsigned words;
#if defined(FP16)
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(second), "f"(first));
#endif
  return words;
#endif
}
__device__ float2 unpair(unsigned words) {
#if defined(FP16)
  float2 numbers;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(numbers.x), "=f"(numbers.y)
      : "r"(words));
  return numbers;
#else
  return make_float2(__uint_as_float(words << 16), __uint_as_float(words & 0xffff0000u));
#endif
}

#endif

// --- gradients of the LoRA's matrices: grad_A += grad_h^T x and grad_B += scale * grad_y^T h ---
//
// x (rows, width), grad_y (rows, out_width), h and grad_h (rows, rank); grad_A (rank, width) and grad_B (out_width, rank)
// are fp32. Each is the product of a narrow and a wide matrix over the rows, split into TILES of 16 ranks and strips of
// STRIP columns of the wide one. First every block finds the sums of a strip over `rows_per_block` rows, then they are
// added up.

#define STRIP 128
#define STAGE_ROWS 64

// Which strip of which product blockIdx.x is: those of grad_A first, then those of grad_B.
struct Strip {
  bool is_A;
  int first, columns;
  __device__ Strip(int width, int out_width) {
    int strips_A = (width + STRIP - 1) / STRIP, of_B = blockIdx.x - strips_A;
    is_A = of_B < 0;
    first = (is_A ? blockIdx.x : of_B) * STRIP;
    columns = is_A ? width : out_width;
  }
};

// partial (strips, gridDim.y, TILES * 16, STRIP)
template <int TILES>
__device__ void lora_gradient_sums(const word* x, const word* grad_h, const word* grad_y, const word* h, float* partial,
                                   int rows, int width, int out_width, int rank, int rows_per_block) {
  // 8 words more in each row, so that the rows of a matrix lie in different banks.
  alignas(16) __shared__ word wide[STAGE_ROWS][STRIP + 8];
  alignas(16) __shared__ word small[STAGE_ROWS][TILES * 16 + 8];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  Strip strip(width, out_width);
  const word* from_wide = strip.is_A ? x : grad_y;
  const word* from_small = strip.is_A ? grad_h : h;
  int start = blockIdx.y * rows_per_block, end = min(rows, start + rows_per_block);

  Pack next_wide[8], next_small[TILES];
  auto fetch = [&](int row) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int at = row + i * 8 + thread / 16, column = strip.first + thread % 16 * 8;
      bool there = at < end && column < strip.columns;
      next_wide[i] = there ? load(from_wide + (long long)at * strip.columns + column) : Pack{};
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      int pack = i * 128 + thread, at = row + pack / (2 * TILES), column = pack % (2 * TILES) * 8;
      next_small[i] = at < end && column < rank ? load(from_small + (long long)at * rank + column) : Pack{};
    }
  };

  float sums[TILES][4][4] = {};  // of 16 ranks and 8 columns each; a warp has 32 columns
  fetch(start);
  for (int row = start; row < end; row += STAGE_ROWS) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) store(&wide[i * 8 + thread / 16][thread % 16 * 8], next_wide[i]);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      int pack = i * 128 + thread;
      store(&small[pack / (2 * TILES)][pack % (2 * TILES) * 8], next_small[i]);
    }
    __syncthreads();
    if (row + STAGE_ROWS < end) fetch(row + STAGE_ROWS);
#pragma unroll
    for (int k = 0; k < STAGE_ROWS; k += 16) {
      unsigned b[2][4];  // for 16 columns each: rows 0 to 7 and 8 to 15 of the first 8 columns, then of the others
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_transposed(b[half], &wide[k + lane % 16][warp * 32 + half * 16 + lane / 16 * 8]);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        unsigned a[4];  // ranks 0 to 7 and 8 to 15 of rows 0 to 7, then of the others
        load_transposed(a, &small[k + lane / 16 * 8 + lane % 8][tile * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int n = 0; n < 4; ++n)
          multiply_add(sums[tile][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  float* to = partial + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * TILES * 16 * STRIP;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        int r = tile * 16 + lane / 4 + i * 4, column = warp * 32 + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to + r * STRIP + column) = make_float2(sums[tile][n][i], sums[tile][n][i + 1]);
      }
}

#define LORA_GRADIENT_SUMS(TILES)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128) lora_gradient_sums_##TILES(                                        \
      const word* x, const word* grad_h, const word* grad_y, const word* h, float* partial, int rows, int width,       \
      int out_width, int rank, int rows_per_block) {                                                                   \
    lora_gradient_sums<TILES>(x, grad_h, grad_y, h, partial, rows, width, out_width, rank, rows_per_block);            \
  }

LORA_GRADIENT_SUMS(1)
LORA_GRADIENT_SUMS(2)
LORA_GRADIENT_SUMS(3)
LORA_GRADIENT_SUMS(4)

// A block is the STRIP columns of the rank blockIdx.y; partial is (strips, blocks, most_ranks, STRIP).
extern "C" __global__ void add_lora_gradients(const float* partial, float* grad_A, float* grad_B, int blocks,
                                              int most_ranks, int width, int out_width, int rank, float scale) {
  Strip strip(width, out_width);
  int r = blockIdx.y, column = strip.first + threadIdx.x;
  if (r >= rank || column >= strip.columns) return;
  const float* from = partial + ((long long)blockIdx.x * blocks * most_ranks + r) * STRIP + threadIdx.x;
  float total = 0.f;
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) total += from[(long long)block * most_ranks * STRIP];
  if (strip.is_A)
    grad_A[(long long)r * width + column] += total;
  else
    grad_B[(long long)column * rank + r] += scale * total;
}

// --- attention to a prompt: y = softmax(q k^T / sqrt(HEAD)) v, for each head ---
//
// q, y, grad_y and grad_q (pictures, tokens, heads, HEAD); k and v (pictures, keys, heads, HEAD), their tokens `stride`
// words apart, grad_k and grad_v the same, but dense. log_sums (pictures, heads, tokens), fp32: the logarithm to base 2 of
// a softmax's denominator. A block has a head of a picture, with all its keys and values, which is what makes a softmax
// one pass and each gradient a sum within the block, and some queries of its tokens at a time.

#define HEAD 64
#define KEYS 80  // at most
#define SCALE 0.125f  // 1 / sqrt(HEAD)
#define LOG2_SCALE 0.180336880111f  // of the scores as exponents of 2: SCALE / log(2)
#define FORWARD_QUERIES 64
#define FORWARD_THREADS 128  // a warp for 16 queries
#define BACKWARD_QUERIES 32
#define BACKWARD_THREADS 160  // a warp for 16 keys

// Rows in shared memory, so long that eight of them, which a matrix is loaded from, lie in different banks.
template <int ROWS>
struct Tile {
  alignas(16) word at[ROWS][HEAD + 8];

  // Where a lane points to load four matrices (8 x 8): rows `row` and `row` + 8 of the columns from `column`, then of
  // the next eight.
  __device__ const word* rows_first(int row, int column) const {
    return &at[row + threadIdx.x % 16][column + threadIdx.x % 32 / 16 * 8];
  }
  // Both eights of columns of the rows from `row`, then of `row` + 8.
  __device__ const word* columns_first(int row, int column) const {
    return &at[row + threadIdx.x % 32 / 16 * 8 + threadIdx.x % 8][column + threadIdx.x / 8 % 2 * 8];
  }
};

// A thread's share of rows on their way from global memory, `stride` words apart; zeros for those beyond `rows`. Eight
// threads have a row.
template <int ROWS, int THREADS>
struct Share {
  static constexpr int COUNT = (ROWS * 8 + THREADS - 1) / THREADS;
  struct alignas(16) Pairs { unsigned at[4]; } pairs[COUNT];

  static __device__ int row(int i) { return i * (THREADS / 8) + threadIdx.x / 8; }
  __device__ void fetch(const word* from, int stride, int rows) {
    const word* mine = from + (threadIdx.x / 8 * stride + threadIdx.x % 8 * 8);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      pairs[i] = row(i) < min(rows, ROWS) ? *reinterpret_cast<const Pairs*>(mine + i * (THREADS / 8) * stride) : Pairs{};
  }
  __device__ void put(Tile<ROWS>& to) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (row(i) < ROWS) *reinterpret_cast<Pairs*>(&to.at[row(i)][threadIdx.x % 8 * 8]) = pairs[i];
  }
};

template <class F>
__device__ float over_lanes(float x, int first, int beyond, F f) {
#pragma unroll
  for (int offset = first; offset < beyond; offset *= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Where the rows of a block's head are: blockIdx.y counts the heads of all pictures. What launches this sees to it that
// 32 bits count the words of a tensor.
struct HeadPlace {
  int queries, keys, dense_keys, width;  // the first three in words, to the first row; width: of a dense row
  __device__ HeadPlace(int tokens, int heads, int keys, int stride) : width(heads * HEAD) {
    int picture = blockIdx.y / heads, column = blockIdx.y % heads * HEAD;
    queries = picture * tokens * width + column;
    dense_keys = picture * keys * width + column;
    this->keys = picture * keys * stride + column;
  }
};

// sums (16 x 8 COUNT) += a (16 x 16) times 16 rows of a tile, from `row` and `column` on
template <int COUNT, int ROWS>
__device__ void add_product(float (&sums)[COUNT][4], const unsigned (&a)[4], const Tile<ROWS>& rows, int row,
                            int column) {
#pragma unroll
  for (int n = 0; n < COUNT; n += 2) {
    unsigned b[4];
    load_transposed(b, rows.rows_first(row, column + n * 8));
    multiply_add(sums[n], a, b[0], b[1]);
    multiply_add(sums[n + 1], a, b[2], b[3]);
  }
}

// sums (16 x 8 COUNT) += a (16 x 16) times 16 columns of 8 COUNT rows of a tile, transposed
template <int COUNT, int ROWS>
__device__ void add_product_with_rows(float (&sums)[COUNT][4], const unsigned (&a)[4], const Tile<ROWS>& rows,
                                      int column) {
#pragma unroll
  for (int n = 0; n < COUNT; n += 2) {
    unsigned b[4];
    load_matrices(b, rows.columns_first(n * 8, column));
    multiply_add(sums[n], a, b[0], b[1]);
    multiply_add(sums[n + 1], a, b[2], b[3]);
  }
}

// Sums lie as a product takes its first matrix: those of columns 16 k and on.
template <int COUNT>
__device__ void as_first(unsigned (&a)[4], const float (&sums)[COUNT][4], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pair(sums[2 * k + i / 2][i % 2 * 2], sums[2 * k + i / 2][i % 2 * 2 + 1]);
}

// Writes sums (16 x 8 COUNT), scaled, to the rows from `row` on that are below `rows`: by `scale` the rows g, by `other`
// the rows g + 8.
template <int COUNT>
__device__ void write(const float (&sums)[COUNT][4], float scale, float other, word* to, int stride, int row, int rows) {
  row += threadIdx.x % 32 / 4;
  to += row * stride + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row + half * 8 < rows)
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
        *reinterpret_cast<unsigned*>(to + half * 8 * stride + n * 8) =
            pair(sums[n][half * 2] * (half ? other : scale), sums[n][half * 2 + 1] * (half ? other : scale));
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, 5) attend_to_text(
    const word* q, const word* k, const word* v, word* y, float* log_sums, int tokens, int heads, int keys, int stride) {
  __shared__ Tile<KEYS> key_tile, value_tile;
  __shared__ Tile<FORWARD_QUERIES> query_tile;
  HeadPlace place(tokens, heads, keys, stride);
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  for (int first = blockIdx.x * FORWARD_QUERIES; first < tokens; first += gridDim.x * FORWARD_QUERIES) {
    Share<FORWARD_QUERIES, FORWARD_THREADS> queries;
    queries.fetch(q + (place.queries + first * place.width), place.width, tokens - first);
    if (first == blockIdx.x * FORWARD_QUERIES) {
      Share<KEYS, FORWARD_THREADS> share, other;
      share.fetch(k + place.keys, stride, keys);
      other.fetch(v + place.keys, stride, keys);
      share.put(key_tile);
      other.put(value_tile);
    }
    queries.put(query_tile);
    __syncthreads();
    float weights[KEYS / 8][4] = {};
#pragma unroll
    for (int column = 0; column < HEAD; column += 16) {
      unsigned a[4];
      load_matrices(a, query_tile.rows_first(row, column));
      add_product_with_rows(weights, a, key_tile, column);
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
      if (n * 8 + 8 > keys)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + lane % 4 * 2 + i % 2 >= keys) weights[n][i] = __uint_as_float(0xff800000u);  // -inf
    float one_over_total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8, each of four lanes
      float most = weights[0][half * 2], total = 0.f;
#pragma unroll
      for (int i = 1; i < KEYS / 4; ++i) most = fmaxf(most, weights[i / 2][half * 2 + i % 2]);
      most = over_lanes(most, 1, 4, [](float a, float b) { return fmaxf(a, b); }) * LOG2_SCALE;
#pragma unroll
      for (int i = 0; i < KEYS / 4; ++i) {
        float& x = weights[i / 2][half * 2 + i % 2];
        x = power_of_2(x * LOG2_SCALE - most);
        total += x;
      }
      total = over_lanes(total, 1, 4, [](float a, float b) { return a + b; });
      one_over_total[half] = quotient(1.f, total);
      int token = first + row + half * 8 + lane / 4;
      if (lane % 4 == 0 && token < tokens) log_sums[blockIdx.y * tokens + token] = most + log2f(total);
    }
    float sums[HEAD / 8][4] = {};
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
      unsigned a[4];
      as_first(a, weights, i);
      add_product(sums, a, value_tile, i * 16, 0);
    }
    write(sums, one_over_total[0], one_over_total[1], y + (place.queries + first * place.width), place.width, row,
          tokens - first);
    __syncthreads();
  }
}

// What the backward pass needs of BACKWARD_QUERIES rows: q, grad_y, log_sums, and the products of y and grad_y, which are
// each row's mean gradient of its weights.
struct Queries {
  Share<BACKWARD_QUERIES, BACKWARD_THREADS> queries, grads, outputs;
  float log_sum;

  __device__ void fetch(const word* q, const word* y, const word* grad_y, const float* log_sums, int stride,
                        int rows) {
    queries.fetch(q, stride, rows);
    grads.fetch(grad_y, stride, rows);
    outputs.fetch(y, stride, rows);
    log_sum = (int)threadIdx.x < min(rows, BACKWARD_QUERIES) ? log_sums[threadIdx.x] : 0.f;
  }
  __device__ void put(Tile<BACKWARD_QUERIES>& query_tile, Tile<BACKWARD_QUERIES>& grad_tile, float2* of_rows) const {
    queries.put(query_tile);
    grads.put(grad_tile);
#pragma unroll
    for (int i = 0; i < queries.COUNT; ++i) {
      float mean = 0.f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float2 grad = unpair(grads.pairs[i].at[k]), output = unpair(outputs.pairs[i].at[k]);
        mean += grad.x * output.x + grad.y * output.y;
      }
      mean = over_lanes(mean, 1, 8, [](float a, float b) { return a + b; });
      if (threadIdx.x % 8 == 0 && queries.row(i) < BACKWARD_QUERIES) of_rows[queries.row(i)].y = mean;
    }
    if (threadIdx.x < BACKWARD_QUERIES) of_rows[threadIdx.x].x = log_sum;
  }
};

// partial (blocks of a head, pictures * heads, 2, KEYS, HEAD), used where a head has several blocks: then the last one
// that is done adds their sums up.
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 2) attend_to_text_backward(
    const word* q, const word* k, const word* v, const word* y, const float* log_sums, const word* grad_y, word* grad_q,
    word* grad_k, word* grad_v, float* partial, unsigned* counters, int tokens, int heads, int keys, int stride) {
  __shared__ Tile<KEYS> key_tile, value_tile;
  // Gradients of scores; rows so long that those of a matrix lie in different banks.
  alignas(16) __shared__ word score_tile[KEYS][BACKWARD_QUERIES + 8];
  __shared__ Tile<BACKWARD_QUERIES> query_tile, grad_tile;
  __shared__ float2 of_rows[BACKWARD_QUERIES];  // log_sums, and mean gradients of weights
  HeadPlace place(tokens, heads, keys, stride);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16;  // row: the warp's first key
  Queries next;
  auto fetch = [&](int first) {
    int at = place.queries + first * place.width;
    const float* from = log_sums + (blockIdx.y * tokens + first);
    next.fetch(q + at, y + at, grad_y + at, from, place.width, tokens - first);
  };
  {
    Share<KEYS, BACKWARD_THREADS> share, other;
    share.fetch(k + place.keys, stride, keys);
    other.fetch(v + place.keys, stride, keys);
    fetch(blockIdx.x * BACKWARD_QUERIES);
    share.put(key_tile);
    other.put(value_tile);
    next.put(query_tile, grad_tile, of_rows);
  }
  float grad_keys[HEAD / 8][4] = {}, grad_values[HEAD / 8][4] = {};
  for (int first = blockIdx.x * BACKWARD_QUERIES; first < tokens; first += gridDim.x * BACKWARD_QUERIES) {
    __syncthreads();
    float weights[BACKWARD_QUERIES / 8][4] = {}, grads[BACKWARD_QUERIES / 8][4] = {};  // of the warp's 16 keys
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
      unsigned a[4];
      load_matrices(a, key_tile.rows_first(row, i * 16));
      add_product_with_rows(weights, a, query_tile, i * 16);
      load_matrices(a, value_tile.rows_first(row, i * 16));
      add_product_with_rows(grads, a, grad_tile, i * 16);
    }
#pragma unroll
    for (int n = 0; n < BACKWARD_QUERIES / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 of_row = of_rows[n * 8 + lane % 4 * 2 + i % 2];
        weights[n][i] = power_of_2(weights[n][i] * LOG2_SCALE - of_row.x);
        grads[n][i] -= of_row.y;
      }
    fetch(first + gridDim.x * BACKWARD_QUERIES);
    if (row + 16 > keys)
#pragma unroll
      for (int i = 0; i < BACKWARD_QUERIES / 2; ++i)
        if (row + i % 4 / 2 * 8 + lane / 4 >= keys) weights[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < BACKWARD_QUERIES / 2; ++i) grads[i / 4][i % 4] *= weights[i / 4][i % 4];  // now of scores
#pragma unroll
    for (int i = 0; i < BACKWARD_QUERIES / 16; ++i) {
      unsigned a[4];
      as_first(a, weights, i);
      add_product(grad_values, a, grad_tile, i * 16, 0);
    }
#pragma unroll
    for (int i = 0; i < BACKWARD_QUERIES / 16; ++i) {
      unsigned a[4];
      as_first(a, grads, i);
#pragma unroll
      for (int of = 0; of < 4; ++of)
        *reinterpret_cast<unsigned*>(&score_tile[row + of % 2 * 8 + lane / 4][i * 16 + of / 2 * 8 + lane % 4 * 2]) = a[of];
      add_product(grad_keys, a, query_tile, i * 16, 0);
    }
    __syncthreads();
    if (warp < 4) {  // which has 16 of the queries here, and half of their words
      int query = warp % 2 * 16, column = warp / 2 * (HEAD / 2);
      float sums[HEAD / 16][4] = {};
#pragma unroll
      for (int i = 0; i < KEYS; i += 16) {
        unsigned a[4];
        load_transposed(a, &score_tile[i + lane / 16 * 8 + lane % 8][query + lane / 8 % 2 * 8]);
        add_product(sums, a, key_tile, i, column);
      }
      word* to = grad_q + (place.queries + first * place.width + column);
      write(sums, SCALE, SCALE, to, place.width, query, tokens - first);
    }
    next.put(query_tile, grad_tile, of_rows);
  }
  auto write_gradients = [&] {
    write(grad_keys, SCALE, SCALE, grad_k + place.dense_keys, place.width, row, keys);
    write(grad_values, 1.f, 1.f, grad_v + place.dense_keys, place.width, row, keys);
  };
  if (gridDim.x == 1) return write_gradients();
  // A thread adds up what lies in it, of all blocks.
  auto sums_of = [&](unsigned block) {
    return reinterpret_cast<float4*>(partial) + (block * gridDim.y + blockIdx.y) * (KEYS * HEAD / 2) + threadIdx.x;
  };
#pragma unroll
  for (int n = 0; n < HEAD / 4; ++n) {
    float(&x)[4] = n % 2 ? grad_values[n / 2] : grad_keys[n / 2];
    sums_of(blockIdx.x)[n * BACKWARD_THREADS] = make_float4(x[0], x[1], x[2], x[3]);
    x[0] = x[1] = x[2] = x[3] = 0.f;
  }
  if (!is_last_block(counters)) return;
  for (unsigned block = 0; block < gridDim.x; ++block) {
#pragma unroll
    for (int n = 0; n < HEAD / 4; ++n) {
      float(&x)[4] = n % 2 ? grad_values[n / 2] : grad_keys[n / 2];
      float4 more = sums_of(block)[n * BACKWARD_THREADS];
      x[0] += more.x, x[1] += more.y, x[2] += more.z, x[3] += more.w;
    }
  }
  write_gradients();
}

#endif
