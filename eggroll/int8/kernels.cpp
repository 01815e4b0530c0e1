// Hot loops of integer training on a CPU. Each function computes the same integers as the torch code
// named above it, in one pass over memory; loops are plain, for the compiler to vectorize.
// Integer arguments are int64; the first is the number of threads.
// Shapes: n directions, K blocks, G units of a block, B examples, I / O inputs / outputs, C classes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

// x / 2^bits, to nearest
inline int64_t shifted(int64_t x, int64_t bits) { return (x + (int64_t(1) << bits >> 1)) >> bits; }

// by value: references, as std::clamp takes them, keep loops from being vectorized
template <typename T>
inline T clamped(T x, T most) { return x > most ? most : x < -most ? -most : x; }

constexpr int64_t LANES = 16, TILE = 64;  // int32 of a vector, and columns whose sums stay in registers

// out (columns, at most W) = start + x (2 count) times pairs (count, stride), which are padded to LANES
template <int W>
inline void product(const int16_t* x, const int16_t* pairs, int64_t count, int64_t stride, int64_t columns,
                    const int32_t* start, int32_t* out) {
#ifdef __AVX512BW__  // one instruction multiplies both of a pair
  __m512i sums[W / LANES];
  __mmask16 used[W / LANES];
  for (int64_t i = 0; i < W / LANES; i++) {
    used[i] = __mmask16((1 << std::clamp<int64_t>(columns - LANES * i, 0, LANES)) - 1);
    sums[i] = _mm512_maskz_loadu_epi32(used[i], start + LANES * i);
  }
  for (int64_t g = 0; g < count; g++, pairs += stride) {
    int32_t both;
    std::memcpy(&both, x + 2 * g, sizeof both);
    for (int64_t i = 0; i < W / LANES; i++) {
      const __m512i y = _mm512_loadu_si512(pairs + 2 * LANES * i);
      sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(_mm512_set1_epi32(both), y));
    }
  }
  for (int64_t i = 0; i < W / LANES; i++) _mm512_mask_storeu_epi32(out + LANES * i, used[i], sums[i]);
#else
  const int64_t last = std::min<int64_t>(W, columns);
  std::copy_n(start, last, out);
  for (int64_t g = 0; g < count; g++, pairs += stride)
    for (int64_t i = 0; i < last; i++) out[i] += x[2 * g] * pairs[2 * i] + x[2 * g + 1] * pairs[2 * i + 1];
#endif
}

}  // namespace

extern "C" {

// node_perturbation.Int8NodePerturbation.split: x (1 + n, B, I), columns (I, O), the sums of x[0] (B, O),
// to (K, n, B, O)
void split(int64_t threads, const int8_t* x, const int8_t* columns, const int32_t* sums, int64_t K, int64_t n,
           int64_t B, int64_t O, int64_t I, int64_t G, int32_t* out) {
  const int64_t half = (G + 1) / 2, stride = (O + LANES - 1) / LANES * LANES;
  std::vector<int16_t> pairs(K * half * stride * 2, 0);  // zeros where there is no unit
#pragma omp parallel num_threads(threads)
  {
    std::vector<int16_t> moves(2 * half, 0);
#pragma omp for
    for (int64_t i = 0; i < I; i++) {
      int16_t* row = pairs.data() + (i / G * half + i % G / 2) * stride * 2 + i % G % 2;
      for (int64_t o = 0; o < O; o++) row[2 * o] = columns[i * O + o];
    }
#pragma omp for collapse(2)
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = 0; j < n; j++)
        for (int64_t b = 0; b < B; b++) {
          const int8_t *still = x + b * I + k * G, *moved = still + (1 + j) * B * I;
          const int64_t width = std::min(G, I - k * G);
          for (int64_t g = 0; g < width; g++) moves[g] = moved[g] - still[g];
          std::fill(moves.begin() + width, moves.end(), 0);
          const int16_t* own = pairs.data() + k * half * stride * 2;
          int32_t* to = out + ((k * n + j) * B + b) * O;
          int64_t o = 0;
          for (; o + TILE <= stride; o += TILE)
            product<TILE>(moves.data(), own + 2 * o, half, 2 * stride, O - o, sums + b * O + o, to + o);
          for (; o < O; o += LANES)
            product<LANES>(moves.data(), own + 2 * o, half, 2 * stride, O - o, sums + b * O + o, to + o);
        }
  }
}

// network.activation
void activate(int64_t threads, const int32_t* __restrict x, int64_t count, int64_t fraction_bits,
              int64_t scale_bits, int8_t* __restrict out) {
  const int shift = int(fraction_bits - scale_bits), gate_bits = int(scale_bits + 2);
  const int32_t two = 2 << scale_bits, half = 1 << (shift - 1), gate_half = 1 << (gate_bits - 1);
#pragma omp parallel for simd num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const int32_t y = clamped((x[i] + half) >> shift, 127);
    out[i] = int8_t((y * (clamped(y, two) + two) + gate_half) >> gate_bits);
  }
}

// fitness.Int8CrossEntropy: logits (P, B, C), labels (B) to (P, B). Vector units work along LANES rows
void log_likelihood(int64_t threads, const int32_t* logits, const int64_t* labels, const int32_t* logarithms,
                    int64_t P, int64_t B, int64_t C, int64_t smoothing, int64_t parts, int64_t fraction_bits,
                    int64_t power_bits, int64_t linear, int64_t square, int64_t cube, int32_t* out) {
  const int32_t unit = 1 << fraction_bits, c1 = int32_t(linear), c2 = int32_t(square), c3 = int32_t(cube);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> x(C * LANES, 0);
#pragma omp for
    for (int64_t first = 0; first < P * B; first += LANES) {
      const int64_t rows = std::min(LANES, P * B - first);
      int32_t top[LANES], sum[LANES] = {0}, excess[LANES];
      for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < C; c++) x[c * LANES + row] = logits[(first + row) * C + c];
      std::copy_n(x.data(), LANES, top);
      std::fill_n(excess, LANES, -(1 << power_bits));
      for (int64_t c = 1; c < C; c++)
        for (int64_t i = 0; i < LANES; i++) top[i] = std::max(top[i], x[c * LANES + i]);
      for (int64_t c = 0; c < C; c++)
        for (int64_t i = 0; i < LANES; i++) {
          const int32_t below = x[c * LANES + i] - top[i], f = below & (unit - 1);
          const int32_t inner = ((c3 * f >> fraction_bits) + c2) * f >> fraction_bits;
          const int32_t power = ((inner + c1) * f >> fraction_bits) + (1 << power_bits);
          excess[i] += power >> std::min(-(below >> fraction_bits), 31);
          sum[i] += x[c * LANES + i];
        }
      for (int64_t i = 0; i < rows; i++) {
        int32_t chosen = x[labels[(first + i) % B] * LANES + i];
        const int32_t spread = int32_t(smoothing) * (sum[i] - int32_t(C) * chosen), whole = int32_t(parts * C);
        chosen += spread / whole - (spread % whole < 0);  // rounded down
        out[first + i] = chosen - logarithms[excess[i] >> (power_bits - fraction_bits)] - top[i];
      }
    }
  }
}

// optimizer.follow: momentum is in 2^-momentum_bits, rate in 2^-rate_bits
void follow(int64_t threads, const int32_t* __restrict direction, int64_t count, int64_t momentum,
            int64_t momentum_bits, int64_t rate, int64_t rate_bits, int64_t residual_bits,
            int32_t* __restrict memory, int32_t* __restrict residual, int8_t* __restrict weight) {
#pragma omp parallel for simd num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const int64_t kept = shifted(memory[i] * momentum, momentum_bits);
    memory[i] = int32_t(clamped<int64_t>(kept + direction[i], INT32_MAX));
    const int64_t total = residual[i] + shifted(memory[i] * rate, rate_bits), step = shifted(total, residual_bits);
    residual[i] = int32_t(total - (step << residual_bits));
    weight[i] = int8_t(clamped<int64_t>(weight[i] + step, 127));
  }
}

// node_perturbation.deltas: weights (n, K, B), rows (n, O), signs (B, O), to (B, O)
void deltas(int64_t threads, const int32_t* weights, const int32_t* rows, const int32_t* signs, int64_t n,
            int64_t K, int64_t B, int64_t O, int64_t G, int64_t factor, int64_t bits, int64_t most, int32_t* out) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < B; b++) {
    int32_t* sums = out + b * O;
    std::fill_n(sums, O, 0);
    for (int64_t j = 0; j < n; j++)
      for (int64_t k = 0; k < K; k++) {
        const int32_t change = clamped(weights[(j * K + k) * B + b], int32_t(most));
        for (int64_t o = k * G; o < std::min(O, (k + 1) * G); o++) sums[o] += change * rows[j * O + o];
      }
    for (int64_t o = 0; o < O; o++)
      sums[o] = int32_t(clamped(shifted(sums[o] * signs[b * O + o] * factor, bits), most));
  }
}

}  // extern "C"
