// Hot loops of integer training on a CPU. Each computes the same integers as the torch code beside it.
// Integer arguments are int64; the first is the number of threads.
// Shapes: n directions, K blocks, G units of a block, B examples, O outputs of a layer, C classes.
#include "../member_loops.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// as in network.py and fitness.py
constexpr int SCALE_BITS = 4, FRACTION_BITS = 12, POWER_BITS = 15, CUBIC[] = {22810, 7358, 2600};
constexpr int SMOOTHING_BITS = 8, DIRECTION_BITS = 4, NOISE_BITS = 6;
constexpr int ACTIVE_BITS = FRACTION_BITS - SCALE_BITS;  // from outputs of a layer to activations

typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// x / 2^bits, to nearest
template <class T>
inline T shifted(T x, int bits) {
  const T one = T{} + 1;
  return (x + (one << bits >> 1)) >> bits;
}

// by value: references, as std::clamp takes them, keep loops from being vectorized
template <class T>
inline T clamped(T x, T most) {
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

// sum + x y of the two int16 in each int32
inline Ints multiply_pairs(Ints sum, Ints x, Ints y) {
#if defined(__AVX512VNNI__)
  return Ints(_mm512_dpwssd_epi32(__m512i(sum), __m512i(x), __m512i(y)));
#elif defined(__AVX512BW__)
  return sum + Ints(_mm512_madd_epi16(__m512i(x), __m512i(y)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + Ints(_mm256_madd_epi16(__m256i(x), __m256i(y)));
#else
  return sum + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// network.activation of two vectors that are shifted to int8's scale: pairs of int16
inline Ints activation(Ints x, Ints y) {
  const Ints most = Ints{} + 127;
  const Shorts both = Shorts((clamped(x, most) & 0xffff) | clamped(y, most) << 16);
  const Shorts two = Shorts{} + int16_t(2 << SCALE_BITS);
  return Ints(shifted<Shorts>(both * (clamped(both, two) + two), SCALE_BITS + 2));
}

// What follows the outputs of the last layer
struct Score {
  int64_t kind, smoothing;  // kind 0: cross-entropy, 1: accuracy, 2: linear
  const int32_t* target;    // (C, padded): 1 where the label is, or a direction
  int64_t padded;
  const int32_t* unperturbed;  // logits (C, padded) that the direction starts at
  const int32_t* logarithms;

  Ints target_of(int64_t c, int64_t b) const { return load(target + c * padded + b); }
};

// x / C, rounded down, for |x| < 2^23: vectors have no integer division, so float32's quotient is corrected
inline Ints divided(Ints x, int32_t C) {
  Ints quotient = __builtin_convertvector(__builtin_convertvector(x, Floats) / float(C), Ints);
  quotient += quotient * C > x;  // a comparison gives -1
  return quotient - (quotient * C + C <= x);
}

// fitness.Int8CrossEntropy of logits x (C, PAIR)
inline Ints cross_entropy(const Ints* x, int32_t C, const Score& by, int64_t b) {
  Ints top = x[0], sum = {}, chosen = {}, excess = Ints{} - (1 << POWER_BITS);
  for (int32_t c = 1; c < C; c++) top = x[c * PAIR] > top ? x[c * PAIR] : top;
  for (int32_t c = 0; c < C; c++) {
    const Ints y = x[c * PAIR], below = y - top, f = below & ((1 << FRACTION_BITS) - 1);
    const Ints inner = ((CUBIC[2] * f >> FRACTION_BITS) + CUBIC[1]) * f >> FRACTION_BITS;
    const Ints power = ((inner + CUBIC[0]) * f >> FRACTION_BITS) + (1 << POWER_BITS);
    const Ints whole = -(below >> FRACTION_BITS);
    excess += power >> (whole > 31 ? Ints{} + 31 : whole);
    chosen = by.target_of(c, b) != 0 ? y : chosen;
    sum += y;
  }
  if (by.smoothing) chosen += divided(int32_t(by.smoothing) * (sum - C * chosen) >> SMOOTHING_BITS, C);
  excess >>= POWER_BITS - FRACTION_BITS;
  for (int i = 0; i < LANES; i++) chosen[i] -= by.logarithms[excess[i]];
  return chosen - top;
}

// fitness.Int8Accuracy
inline Ints accuracy(const Ints* x, int32_t C, const Score& by, int64_t b) {
  return first_of_largest(x, C, by.target + b, by.padded) << FRACTION_BITS;
}

// fitness.Int8Smoothing.score of how far the logits moved
inline Ints linear(const Ints* x, int32_t C, const Score& by, int64_t b) {
  Ints total = {};
  for (int32_t c = 0; c < C; c++)
    total += (x[c * PAIR] - load(by.unperturbed + c * by.padded + b)) * by.target_of(c, b);
  return shifted(total, DIRECTION_BITS + NOISE_BITS);
}

// A Vector of inputs has two units: the low and the high int16 of each int32
struct Products {
  static constexpr int UNITS = 2;
  static Ints multiply_add(Ints sum, Ints x, int32_t w) { return multiply_pairs(sum, x, Ints{} + w); }
  static Ints last(Ints sum, int64_t) { return sum; }
};

// of MemberLoops
struct Int8Arithmetic : Products {
  using Number = int32_t;
  using Vector = Ints;
  const Score by;
  const int64_t* bits;  // bits that sums of a later layer are shifted down by, or up below 0

  static Ints less(Ints x, Ints y) { return Ints(Shorts(x) - Shorts(y)); }
  static Ints active(const Ints* units) {
    return activation(shifted(units[0], ACTIVE_BITS), shifted(units[1], ACTIVE_BITS));
  }
  // two roundings in one shift: floor((floor(x / a) + b) / c) = floor((x + a b) / (a c))
  Ints hidden(const Ints* sums, int64_t l) const {
    const int first = int(bits[l]), down = first + ACTIVE_BITS;
    const int32_t half = (1 << down >> 1) + (first > 0 ? 1 << (first - 1) : 0);
    return activation((sums[0] + half) >> down, (sums[1] + half) >> down);
  }
  Ints last(Ints sum, int64_t l) const {
    const int down = int(bits[l]);
    return down < 0 ? sum << -down : shifted(sum, down);
  }
  Ints score(const Ints* x, int64_t C, int64_t b) const {
    const auto of = by.kind == 0 ? cross_entropy : by.kind == 1 ? accuracy : linear;
    return of(x, int32_t(C), by, b);
  }
};

// Sums (O) of one example's weights (n, K, stride), within +-most, times rows (n, O)
inline void sum_of_rows(const int32_t* weights, const int32_t* rows, int64_t n, int64_t K, int64_t stride, int64_t O,
                        int64_t G, int32_t most, int32_t* sums) {
  for (int64_t k = 0; k < K; k++)
    for (int64_t o = k * G, end = std::min(O, o + G); o < end; o += LANES) {
      const int64_t width = std::min<int64_t>(LANES, end - o);
      Ints sum = {};
      for (int64_t j = 0; j < n; j++)
        sum += clamped(weights[(j * K + k) * stride], most) * load(rows + j * O + o, width);
      std::memcpy(sums + o, &sum, 4 * width);
    }
}

// Pairs (TILE) of the int16 of one or two rows, of which `width` are there
inline void pair_rows(const int8_t* first, const int8_t* second, int64_t width, Ints* pairs) {
  int32_t both[TILE] = {};
  for (int64_t i = 0; i < width; i++) both[i] = first[i] & 0xffff;
  if (second)
    for (int64_t i = 0; i < width; i++) both[i] |= second[i] << 16;
  std::memcpy(pairs, both, sizeof both);
}

}  // namespace

extern "C" {

// Scores (n, K, B) of members that move one block of a layer's outputs each. moved (n, B, U) is what the layer
// wrote, still (U, padded) its unperturbed output; of the last layer, what is subtracted. Of each later layer:
// weights (I / 2, O), pairs of int16, sizes O, bits, and starts (O, padded), to which the product of what has
// moved is added: the unperturbed sums of the first later layer, of the others 0.
void members(int64_t threads, const int32_t* moved, const int32_t* still, int64_t n, int64_t B, int64_t padded,
             int64_t U, int64_t G, int64_t later, const int32_t* const* weights, const int32_t* const* starts,
             const int64_t* sizes, const int64_t* bits, int64_t kind, const int32_t* target, const int32_t* unperturbed,
             int64_t smoothing, const int32_t* logarithms, int32_t* out) {
  const Members<int32_t> all{threads, n, B, padded, U, G, later, moved, still, weights, starts, sizes, out};
  const Score by{kind, smoothing, target, padded, unperturbed, logarithms};
  MemberLoops<Int8Arithmetic>({{}, by, bits}, all).run();
}

// network.activation
void activate(int64_t threads, const int32_t* __restrict x, int64_t count, int8_t* __restrict out) {
  constexpr int two = 2 << SCALE_BITS;
#pragma omp parallel for simd num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const int y = clamped(shifted(x[i], ACTIVE_BITS), 127);
    out[i] = int8_t(shifted(y * (clamped(y, two) + two), SCALE_BITS + 2));
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

// node_perturbation.call_gradient (O, I) of weights (n, K, B), rows (n, O), signs (B, O) and inputs (B, I)
void gradient(int64_t threads, const int32_t* weights, const int32_t* rows, const int32_t* signs,
              const int8_t* inputs, int64_t n, int64_t K, int64_t B, int64_t O, int64_t I, int64_t G,
              int64_t factor, int64_t bits, int64_t most, int32_t* out) {
  const int64_t pairs = (B + 1) / 2;
  std::vector<int32_t> deltas(pairs * O), zeros(TILE);  // pairs of examples
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> sums(O);
    std::vector<Ints> x(pairs * PAIR), y(O * PAIR);
#pragma omp for
    for (int64_t pair = 0; pair < pairs; pair++)
      for (int64_t b = 2 * pair; b < std::min(B, 2 * pair + 2); b++) {
        sum_of_rows(weights + b, rows, n, K, B, O, G, int32_t(most), sums.data());
        for (int64_t o = 0; o < O; o++) {
          const int64_t delta = clamped(shifted(sums[o] * signs[b * O + o] * factor, int(bits)), most);
          deltas[pair * O + o] |= b % 2 ? int32_t(delta) << 16 : int32_t(delta) & 0xffff;
        }
      }
#pragma omp for
    for (int64_t first = 0; first < I; first += TILE) {
      const int64_t width = std::min<int64_t>(TILE, I - first);
      for (int64_t b = 0; b < B; b += 2) {
        const int8_t* row = inputs + b * I + first;
        pair_rows(row, b + 1 < B ? row + I : nullptr, width, &x[b / 2 * PAIR]);
      }
      layer<false>(Products(), 0, x.data(), pairs, deltas.data(), O, zeros.data(), 0, y.data());
      for (int64_t o = 0; o < O; o++) std::memcpy(out + o * I + first, &y[o * PAIR], 4 * width);
    }
  }
}

}  // extern "C"
