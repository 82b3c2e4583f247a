// Products of a few float32 rows on a CPU, and tree attention made of them.
// Compiled at start-up by cpu_rows.py; -march=native sets what a vector becomes.

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));

constexpr long kPanel = 16;  // columns computed together: two vectors
constexpr long kRows = 6;    // rows computed together: 12 sums, 2 weights and a factor fill
                             // the 16 vector registers of AVX2

// A panel's 16 weights for one k, as two vectors.
inline void load(const float* panel, Lanes& left, Lanes& right) {
  left = *reinterpret_cast<const Lanes*>(panel);
  right = *reinterpret_cast<const Lanes*>(panel + 8);
}

// Eight words of two bfloat16: column j below column j + 8. A bfloat16 is the upper half of
// the float32 of the same value, so both vectors are exact.
inline void load(const int32_t* panel, Lanes& left, Lanes& right) {
  const Ints words = *reinterpret_cast<const Ints*>(panel);
  left = (Lanes)(words << 16);
  right = (Lanes)(words & (int32_t)0xffff0000);
}

// out[r][0..16) (+)= sum over k of a[r][k] * b[k][0..16). The order of each row's sum does
// not depend on R, so a row's result does not depend on how many rows come with it.
template <int R, bool kAdd, class Weight>
void product(const float* __restrict a, long a_stride, const Weight* __restrict b, long b_stride,
             long depth, float* __restrict out, long out_stride) {
  Lanes left[R], right[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const float* row = out + r * out_stride;
    left[r] = kAdd ? *reinterpret_cast<const Lanes*>(row) : Lanes{};
    right[r] = kAdd ? *reinterpret_cast<const Lanes*>(row + 8) : Lanes{};
  }
  for (long k = 0; k < depth; k++) {
    const Weight* weights = b + k * b_stride;
    Lanes p, q;
    load(weights, p, q);
    __builtin_prefetch(weights + 512);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float factor = a[r * a_stride + k];
      left[r] += factor * p;
      right[r] += factor * q;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    *reinterpret_cast<Lanes*>(out + r * out_stride) = left[r];
    *reinterpret_cast<Lanes*>(out + r * out_stride + 8) = right[r];
  }
}

template <class Weight>
using Product = void (*)(const float*, long, const Weight*, long, long, float*, long);
template <bool kAdd, class Weight>
constexpr Product<Weight> kProducts[] = {
    product<1, kAdd, Weight>, product<2, kAdd, Weight>, product<3, kAdd, Weight>,
    product<4, kAdd, Weight>, product<5, kAdd, Weight>, product<6, kAdd, Weight>};

// out [rows, width] = a [rows, depth] times panels [width / 16, depth, stride].
// A panel is read from memory once; further groups of rows find it in the cache.
template <class Weight, long kStride>
void multiply(const float* a, long rows, const Weight* panels, long depth, float* out,
              long width) {
  const long count = width / kPanel, groups = (rows + kRows - 1) / kRows;
#pragma omp parallel
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const long end = count * (thread + 1) / threads;
    for (long panel = count * thread / threads; panel < end; panel++) {
      const Weight* weights = panels + panel * depth * kStride;
      for (long group = 0; group < groups; group++) {
        const long first = rows * group / groups, size = rows * (group + 1) / groups - first;
        kProducts<false, Weight>[size - 1](a + first * depth, depth, weights, kStride, depth,
                                           out + first * width + panel * kPanel, width);
      }
    }
  }
}

// exp(x) for x <= 0, relative error below 2e-7: 2^n times a polynomial on half an octave.
inline Lanes exponential(Lanes x) {
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes n = __builtin_convertvector(
      __builtin_convertvector(x * 1.44269504f - 0.5f, Ints), Lanes);
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = Lanes{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Lanes)power;  // the same bits
}

// Scores -> weights that sum to 1; the last columns are a tree, seen through a mask of words
// that lie `distance` apart.
void softmax(float* scores, long keys, long rows_of_tree, const uint64_t* mask, long distance) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (long j = 0; j < rows_of_tree; j++)
    if (!((mask[j / 64 * distance] >> j % 64) & 1)) scores[keys - rows_of_tree + j] = -infinity;
  const long padded = (keys + 7) / 8 * 8;
  for (long s = keys; s < padded; s++) scores[s] = -infinity;
  float most = -infinity;
  for (long s = 0; s < keys; s++) most = scores[s] > most ? scores[s] : most;
  Lanes sums{};
  for (long s = 0; s < padded; s += 8) {
    Lanes& chunk = *reinterpret_cast<Lanes*>(scores + s);
    const Lanes weights = exponential(chunk - most);
    chunk = chunk == -infinity ? Lanes{} : weights;
    sums += chunk;
  }
  float sum = 0;
  for (int lane = 0; lane < 8; lane++) sum += sums[lane];
  for (long s = 0; s < padded; s += 8) *reinterpret_cast<Lanes*>(scores + s) *= 1.0f / sum;
}

}  // namespace

// Panels of float32 [width / 16, depth, 16].
extern "C" void rows_product(const float* a, long rows, const float* panels, long depth,
                             float* out, long width) {
  multiply<float, kPanel>(a, rows, panels, depth, out, width);
}

// Panels of bfloat16 pairs [width / 16, depth, 8].
extern "C" void rows_product_halves(const float* a, long rows, const int32_t* panels, long depth,
                                    float* out, long width) {
  multiply<int32_t, kPanel / 2>(a, rows, panels, depth, out, width);
}

// One step's tree requests, as cpu_tree_rows.py lays it out: 64-bit words.
struct TreeStep {
  const int32_t* starts;  // [requests + 1] first query row
  const int32_t* keys;    // [requests] keys, the tree's rows included
  const int32_t* table;   // [requests, table_stride] cache blocks
  const uint64_t* masks;  // [requests, mask_stride] row -> visible rows of the tree, rows 64
                          // and up `word_distance` further on
  long requests, table_stride, mask_stride, word_distance;
  long kv_heads, group, size, block_slots;
};

// Cache blocks hold, per KV head, keys [size, block_slots] and then values
// [block_slots, size]. Query rows of all heads of a KV head are one matrix.
extern "C" void tree_rows_attention(const TreeStep* step, const float* query, long query_stride,
                                    const float* cache, long block_stride, float scale,
                                    float* out) {
  const long size = step->size, slots = step->block_slots, group = step->group;
  const long out_stride = step->kv_heads * group * size;
  const long half = size * slots;
#pragma omp parallel
  {
    static thread_local std::vector<float> space;
    for (long r = 0; r < step->requests; r++) {
      const long first = step->starts[r], tree = step->starts[r + 1] - first;
      const long keys = step->keys[r], width = (keys + slots - 1) / slots * slots;
      const long rows = tree * group, parts = (rows + kRows - 1) / kRows;
      const int32_t* table = step->table + r * step->table_stride;
      if ((long)space.size() < kRows * (width + 2 * size)) space.resize(kRows * (width + 2 * size));
      float *queries = space.data(), *mixed = queries + kRows * size, *scores = mixed + kRows * size;
#pragma omp for schedule(static) nowait
      for (long item = 0; item < step->kv_heads * parts; item++) {
        const long head = item / parts, part = item % parts;
        const long low = rows * part / parts, n = rows * (part + 1) / parts - low;
        for (long m = 0; m < n; m++) {
          const long row = first + (low + m) / group, column = head * group + (low + m) % group;
          for (long d = 0; d < size; d++) {
            queries[m * size + d] = query[row * query_stride + column * size + d] * scale;
            mixed[m * size + d] = 0;
          }
        }
        for (long s = 0; s < keys; s += kPanel) {
          const float* block = cache + table[s / slots] * block_stride + head * 2 * half;
          kProducts<false, float>[n - 1](queries, size, block + s % slots, slots, size, scores + s, width);
        }
        for (long m = 0; m < n; m++)
          softmax(scores + m * width, keys, tree,
                  step->masks + r * step->mask_stride + (low + m) / group, step->word_distance);
        for (long s = 0; s < keys; s += slots) {
          const float* values = cache + table[s / slots] * block_stride + head * 2 * half + half;
          const long depth = keys - s < slots ? keys - s : slots;
          for (long d = 0; d < size; d += kPanel)
            kProducts<true, float>[n - 1](scores + s, width, values + d, size, depth, mixed + d, size);
        }
        for (long m = 0; m < n; m++) {
          const long row = first + (low + m) / group, column = head * group + (low + m) % group;
          float* target = out + row * out_stride + column * size;
          for (long d = 0; d < size; d++) target[d] = mixed[m * size + d];
        }
      }
    }
  }
}
