// The hot loops of integer training on a CPU. Every function computes the same integers as the torch
// code that is named above it, in one pass over memory; loops are plain, for the compiler to vectorise.
// Whole numbers in arguments are int64, and the first is the number of threads.
// Shapes: P members, B examples, O/K units of the layer read and written, G units of a block, C classes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

inline int64_t shifted(int64_t x, int64_t bits) { return bits ? (x + (int64_t(1) << (bits - 1))) >> bits : x; }

// x * factor / 2^bits, to nearest, for a factor of up to 2^bits: products of 64 bits would be slow
inline int32_t scaled(int32_t x, int32_t factor, int bits) {
  const uint32_t low = uint32_t(x & ((1 << bits) - 1)) * uint32_t(factor);
  return (x >> bits) * factor + int32_t((uint64_t(low) + (1 << (bits - 1))) >> bits);
}

// by value: references, as std::clamp takes them, keep loops from being vectorised
template <typename T>
inline T clamped(T x, T most) { return x > most ? most : x < -most ? -most : x; }

inline int32_t divided(int32_t x, int32_t divisor) {  // to nearest, halves upwards
  int32_t above = 2 * x + divisor, below = 2 * divisor, whole = above / below;
  return whole - (above % below < 0);
}

inline int32_t floored(int32_t x, int32_t divisor) { return x / divisor - (x % divisor < 0); }

// sums (W) += moves (2 pairs) times pairs (pairs, stride, 2): two products of int16 in one instruction
// where there is one
template <int W>
inline void add_products(const int16_t* moves, const int16_t* pairs, int64_t count, int64_t stride,
                         int32_t* sums) {
#ifdef __AVX512BW__
  __m512i held[W / 16];
  for (int i = 0; i < W / 16; i++) held[i] = _mm512_loadu_si512(sums + 16 * i);
  for (int64_t g = 0; g < count; g++) {
    int32_t both;
    std::memcpy(&both, moves + 2 * g, sizeof both);
    for (int i = 0; i < W / 16; i++) {
      const __m512i w = _mm512_loadu_si512(pairs + 2 * (g * stride + 16 * i));
      held[i] = _mm512_add_epi32(held[i], _mm512_madd_epi16(_mm512_set1_epi32(both), w));
    }
  }
  for (int i = 0; i < W / 16; i++) _mm512_storeu_si512(sums + 16 * i, held[i]);
#else
  for (int64_t g = 0; g < count; g++)
    for (int k = 0; k < W; k++)
      sums[k] += moves[2 * g] * pairs[2 * (g * stride + k)] + moves[2 * g + 1] * pairs[2 * (g * stride + k) + 1];
#endif
}

constexpr int64_t WIDE = 64, NARROW = 16;  // columns whose sums stay in registers
constexpr int64_t PART = 1024;  // weights that one thread moves at a time

inline void remember(const int32_t* __restrict direction, int64_t count, int32_t momentum, int bits,
                     int32_t* __restrict memory) {
  for (int64_t i = 0; i < count; i++)
    memory[i] = int32_t(clamped<int64_t>(int64_t(scaled(memory[i], momentum, bits)) + direction[i], INT32_MAX));
}

inline int64_t move(const int64_t* __restrict asked, int64_t count, int bits, int32_t* __restrict residual,
                    int8_t* __restrict weight) {
  int32_t updated = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t total = residual[i] + asked[i], step = shifted(total, bits);
    residual[i] = int32_t(total - (step << bits));
    const int32_t before = weight[i], after = int32_t(clamped<int64_t>(before + step, 127));
    updated += after != before;
    weight[i] = int8_t(after);
  }
  return updated;
}

}  // namespace

extern "C" {

// network.Int8Linear.product of MovedUnits: states (3, B, O), signs (P, G), blocks (P), weight (K, O), and
// the sums of the unmoved units (B, K), to (P, B, K)
void moved_product(int64_t threads, const int8_t* states, const int32_t* signs, const int64_t* blocks,
                   const int8_t* weight, const int32_t* unmoved, int64_t P, int64_t B, int64_t O,
                   int64_t G, int64_t K, int64_t factor, int64_t divisor, int32_t* out) {
  const int64_t half = (G + 1) / 2, width = (K + NARROW - 1) / NARROW * NARROW, parts = (O + G - 1) / G;
  std::vector<int16_t> pairs(parts * half * width * 2);  // zeros where there is no unit
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < parts * half; row++) {
    const int64_t o = row / half * G + row % half * 2, end = std::min(O, (row / half + 1) * G);
    for (int64_t k = 0; k < K; k++)
      for (int64_t i = 0; i < std::min<int64_t>(2, end - o); i++)
        pairs[(row * width + k) * 2 + i] = weight[k * O + o + i];
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<int16_t> moves(2 * half, 0);
#pragma omp for collapse(2)
    for (int64_t p = 0; p < P; p++)
      for (int64_t b = 0; b < B; b++) {
        const int64_t first = blocks[p] * G;
        for (int64_t g = 0; g < G; g++) {
          const int64_t unit = b * O + first + g;
          const int8_t* moved = states + (signs[p * G + g] > 0 ? 1 : 2) * B * O;
          moves[g] = first + g < O ? moved[unit] - states[unit] : 0;
        }
        const int16_t* own = pairs.data() + blocks[p] * half * width * 2;
        int32_t sums[WIDE], *y = out + (p * B + b) * K;
        for (int64_t k = 0; k < K;) {
          const int64_t tile = width - k >= WIDE ? WIDE : NARROW, last = std::min(tile, K - k);
          std::fill(std::copy_n(unmoved + b * K + k, last, sums), sums + tile, 0);
          const auto add = tile == WIDE ? add_products<WIDE> : add_products<NARROW>;
          add(moves.data(), own + 2 * k, half, width, sums);
          for (int64_t i = 0; i < last; i++) y[k + i] = sums[i] * int32_t(factor);
          if (divisor > 1)
            for (int64_t i = 0; i < last; i++) y[k + i] = divided(y[k + i], int32_t(divisor));
          k += tile;
        }
      }
  }
}

// arithmetic.rounded_division of x * factor, in place
void scale(int64_t threads, int32_t* x, int64_t count, int64_t factor, int64_t divisor) {
  const int32_t times = int32_t(factor), below = int32_t(divisor);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; i++) x[i] = below > 1 ? divided(x[i] * times, below) : x[i] * times;
}

// network.activation
void activate(int64_t threads, const int32_t* __restrict x, int64_t count, int64_t shift, int64_t scale,
              int64_t gate_bits, int8_t* __restrict out) {
  const int32_t one = int32_t(scale), half = 1 << (shift - 1), gate_half = 1 << (gate_bits - 1);
#pragma omp parallel for simd num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const int32_t y = clamped((x[i] + half) >> int(shift), 127);
    const int32_t gate = clamped(y, 2 * one) + 2 * one;
    out[i] = int8_t((y * gate + gate_half) >> int(gate_bits));
  }
}

// fitness.Int8CrossEntropy: logits (P, B, C), labels (B) to (P, B)
void log_likelihood(int64_t threads, const int32_t* logits, const int64_t* labels,
                    const int32_t* logarithms, const int32_t* cubic, int64_t P, int64_t B, int64_t C,
                    int64_t shift, int64_t fraction_bits, int64_t power_bits, int64_t smoothing,
                    int64_t parts, int32_t* out) {
  const int32_t unit = 1 << fraction_bits;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < P * B; row++) {
    const int32_t* x = logits + row * C;
    int32_t top = x[0] >> shift, sum = 0, excess = -(1 << power_bits);
    for (int64_t c = 1; c < C; c++) top = std::max(top, x[c] >> shift);
    for (int64_t c = 0; c < C; c++) {
      const int32_t y = x[c] >> shift, below = y - top, f = below & (unit - 1);
      const int32_t inner = ((cubic[2] * f >> fraction_bits) + cubic[1]) * f >> fraction_bits;
      const int32_t power = ((inner + cubic[0]) * f >> fraction_bits) + (1 << power_bits);
      excess += power >> std::min(-(below >> fraction_bits), 31);
      sum += y;
    }
    int32_t chosen = x[labels[row % B]] >> shift;
    if (smoothing)
      chosen += floored(int32_t(smoothing) * (sum - int32_t(C) * chosen), int32_t(parts * C));
    out[row] = chosen - logarithms[excess >> (power_bits - fraction_bits)] - top;
  }
}

// optimizer.Int8SGD with error feedback; returns how many weights were updated. momentum is in
// 2^-momentum_bits and below 1, and rate in 2^-rate_bits
int64_t follow(int64_t threads, const int32_t* direction, int64_t count, int64_t momentum,
               int64_t momentum_bits, int64_t rate, int64_t rate_bits, int64_t residual_bits,
               int32_t* memory, int32_t* residual, int8_t* weight) {
  int64_t updated = 0;
  const bool narrow = rate <= int64_t(1) << rate_bits;
#pragma omp parallel for num_threads(threads) reduction(+ : updated)
  for (int64_t start = 0; start < count; start += PART) {
    const int64_t length = std::min(PART, count - start);
    remember(direction + start, length, int32_t(momentum), int(momentum_bits), memory + start);
    int64_t asked[PART];
    if (narrow)
      for (int64_t i = 0; i < length; i++) asked[i] = scaled(memory[start + i], int32_t(rate), int(rate_bits));
    else
      for (int64_t i = 0; i < length; i++) asked[i] = shifted(memory[start + i] * rate, rate_bits);
    updated += move(asked, length, int(residual_bits), residual + start, weight + start);
  }
  return updated;
}

// gradient.layer_gradient: scores less the unperturbed network's (P, B), signs (P, G), blocks (P), the
// examples' signs (B, O), members that move each unit (O), and what the layer reads (B, I); to (O, I)
void layer_gradient(int64_t threads, const int32_t* change, const int32_t* signs, const int64_t* blocks,
                    const int32_t* example_signs, const int64_t* per_unit, const int8_t* x, int64_t P,
                    int64_t B, int64_t G, int64_t O, int64_t I, int64_t size, int64_t bits, int64_t most,
                    int32_t* out) {
  const int64_t half = (B + 1) / 2, width = (I + NARROW - 1) / NARROW * NARROW;
  std::vector<int16_t> deltas(O * 2 * half, 0), pairs(half * width * 2, 0);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> sums(O);
#pragma omp for
    for (int64_t b = 0; b < B; b++) {
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t p = 0; p < P; p++) {
        const int64_t score = clamped<int64_t>(change[p * B + b], most), first = blocks[p] * G;
        for (int64_t g = 0; g < std::min(G, O - first); g++) sums[first + g] += score * signs[p * G + g];
      }
      for (int64_t o = 0; o < O; o++) {
        const int64_t above = 2 * (sums[o] * example_signs[b * O + o] << bits) + per_unit[o] * size;
        const int64_t below = 2 * per_unit[o] * size, whole = above / below - (above % below < 0);
        deltas[o * 2 * half + b] = int16_t(clamped(whole, most));
      }
      for (int64_t i = 0; i < I; i++) pairs[(b / 2 * width + i) * 2 + b % 2] = x[b * I + i];
    }
#pragma omp for
    for (int64_t o = 0; o < O; o++)
      for (int64_t i = 0; i < I;) {
        const int64_t tile = width - i >= WIDE ? WIDE : NARROW;
        const auto add = tile == WIDE ? add_products<WIDE> : add_products<NARROW>;
        int32_t totals[WIDE] = {0};
        add(deltas.data() + o * 2 * half, pairs.data() + 2 * i, half, width, totals);
        std::copy_n(totals, std::min(tile, I - i), out + o * I + i);
        i += tile;
      }
  }
}

// the sum of x^2
int64_t squares(int64_t threads, const int8_t* x, int64_t count) {
  int64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
  for (int64_t start = 0; start < count; start += 65536) {
    int32_t part = 0;
    for (int64_t i = start; i < std::min(count, start + 65536); i++) part += int32_t(x[i]) * x[i];
    sum += part;
  }
  return sum;
}

}  // extern "C"
