// Scores of an MLP's members on a CPU, without an activation in memory: see mlp_loops.py.
// Vector extensions of GCC and Clang: one source for AVX-512, AVX2 and NEON. Lanes are examples.
// Shapes: n directions, K blocks, G units of a block, B examples, O outputs of a layer, C classes.
// A row of `padded` examples is B of them and zeros, a multiple of TILE.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // floats of a vector, and outputs whose sums stay in registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int PAIR = 2, TILE = PAIR * LANES;  // vectors, and examples, that are worked on together

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The first `count` floats, and zeros
inline Floats load(const float* from, int64_t count) {
  if (count == LANES) return load(from);
  Floats x = {};
  for (int64_t i = 0; i < count; i++) x[i] = from[i];
  return x;
}

// ---- functions of a vector ----

// 2^x for |x| < 126, to 1e-7 of the result. Adding 1.5 2^23 rounds to an integer
inline Floats exp2(Floats x) {
  const Floats shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  Floats y = r * 0.001327647129073739f + 0.009675540961325169f;
  y = ((y * r + 0.05550713092088699f) * r + 0.24022120237350464f) * r + 0.6931469440460205f;
  y = y * r + 1.0000001192092896f;
  return Floats(Ints(y) + (Ints(shifted) << 23));
}

// log2 x for x >= 1, to 1e-7: x = 2^e m with m in [sqrt(1/2), sqrt(2))
inline Floats log2(Floats x) {
  const Ints e = (Ints(x) - 0x3f3504f3) >> 23;
  const Floats t = Floats(Ints(x) - (e << 23)) - 1.0f;
  Floats y = t * 0.125427708029747f - 0.21028968691825867f;
  y = (y * t + 0.21736575663089752f) * t - 0.23852120339870453f;
  y = (y * t + 0.2876587510108948f) * t - 0.3607211410999298f;
  y = (y * t + 0.4809224307537079f) * t - 0.7213471531867981f;
  return (y * t + 1.442694902420044f) * t + __builtin_convertvector(e, Floats);
}

// NaN stays NaN
inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }

// relu(x) - t Phi(-t), t = |x|, where log2 Phi(-t) is nearly a polynomial: to 7e-7
inline Floats gelu(Floats x) {
  const Floats size = x < 0.0f ? -x : x, t = size > 6.0f ? Floats{} + 6.0f : size;
  Floats y = t * -0.0004732941451948136f + 0.007084462326020002f;
  y = (y * t - 0.051827169954776764f) * t - 0.4599926471710205f;
  y = (y * t - 1.1507878303527832f) * t - 1.000037670135498f;
  return relu(x) - t * exp2(y);
}

inline Floats identity(Floats x) { return x; }

// ---- layers ----

using Activation = Floats (*)(Floats);

// y (N, TILE) = activation of start (N, padded) + w (count, stride) x (count, TILE)
template <int N, Activation activation>
inline void product(const Floats* x, int64_t count, const float* w, int64_t stride, const float* start,
                    int64_t padded, Floats* y) {
  Floats sums[N][PAIR];
  for (int i = 0; i < N; i++)
    for (int v = 0; v < PAIR; v++) sums[i][v] = load(start + i * padded + v * LANES);
  for (int64_t g = 0; g < count; g++, x += PAIR, w += stride)
    for (int i = 0; i < N; i++)
      for (int v = 0; v < PAIR; v++) sums[i][v] += w[i] * x[v];
  for (int i = 0; i < N; i++)
    for (int v = 0; v < PAIR; v++) y[i * PAIR + v] = activation(sums[i][v]);
}

template <Activation activation>
void layer(const Floats* x, int64_t count, const float* w, int64_t O, const float* start, int64_t padded, Floats* y) {
  int64_t o = 0;
  for (; o + ROWS <= O; o += ROWS)
    product<ROWS, activation>(x, count, w + o, O, start + o * padded, padded, y + o * PAIR);
  for (; o + 2 <= O; o += 2)
    product<2, activation>(x, count, w + o, O, start + o * padded, padded, y + o * PAIR);
  for (; o < O; o++) product<1, activation>(x, count, w + o, O, start + o * padded, padded, y + o * PAIR);
}

// ---- examples to lanes ----

template <int S, int... I>
inline void exchange(Floats& x, Floats& y, std::integer_sequence<int, I...>) {
  const Floats a = x, b = y;
  x = Floats{(I & S ? b[I & ~S] : a[I])...};
  y = Floats{(I & S ? b[I] : a[I | S])...};
}

// Transpose (LANES, LANES), by exchanging blocks of S
template <int S = 1>
inline void transpose(Floats* rows) {
  if constexpr (S < LANES) {
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i | S], std::make_integer_sequence<int, LANES>());
    transpose<2 * S>(rows);
  }
}

// activation of x (examples, O), less `before` (O, padded), to (O, TILE)
template <Activation activation>
void moves(const float* x, int64_t examples, int64_t O, const float* before, int64_t padded, Floats* to) {
  for (int v = 0; v < PAIR; v++)
    for (int64_t o = 0; o < O; o += LANES) {
      const int64_t width = std::min<int64_t>(LANES, O - o);
      Floats rows[LANES] = {};
      for (int64_t i = 0; i < std::min<int64_t>(LANES, examples - v * LANES); i++)
        rows[i] = load(x + (v * LANES + i) * O + o, width);
      transpose(rows);
      for (int64_t i = 0; i < width; i++)
        to[(o + i) * PAIR + v] = activation(rows[i]) - load(before + (o + i) * padded + v * LANES);
    }
}

// ---- scores of the outputs y (C, PAIR) of one vector of examples ----

// minus the cross-entropy with target (C, padded), of y times scale
inline Floats cross_entropy(const Floats* y, int64_t C, const float* target, int64_t padded, float scale) {
  Floats total = {}, top = y[0], sum = {};
  for (int64_t c = 1; c < C; c++) top = y[c * PAIR] > top ? y[c * PAIR] : top;
  for (int64_t c = 0; c < C; c++) {
    const Floats below = (y[c * PAIR] - top) * scale, power = below * 1.4426950408889634f;
    sum += exp2(power < -125.0f ? Floats{} - 125.0f : power);
    total += below * load(target + c * padded);
  }
  return total - log2(sum) * 0.6931471805599453f;
}

// The target of the first of the largest outputs
inline Floats accuracy(const Floats* y, int64_t C, const float* target, int64_t padded) {
  Floats top = y[0], hit = load(target);
  for (int64_t c = 1; c < C; c++) {
    const Ints larger = y[c * PAIR] > top;
    hit = larger ? load(target + c * padded) : hit;
    top = larger ? y[c * PAIR] : top;
  }
  return hit;
}

// y times target
inline Floats linear(const Floats* y, int64_t C, const float* target, int64_t padded) {
  Floats total = {};
  for (int64_t c = 0; c < C; c++) total += y[c * PAIR] * load(target + c * padded);
  return total;
}

template <Activation activation>
void score_members(int64_t threads, const float* moved, const float* still, int64_t n, int64_t B, int64_t padded,
                   int64_t U, int64_t G, int64_t later, const float* const* weights, const float* const* starts,
                   const int64_t* sizes, int64_t kind, const float* target, float scale, float* out) {
  const int64_t K = (U + G - 1) / G, C = later ? sizes[later - 1] : U;
  const int64_t widest = later ? *std::max_element(sizes, sizes + later) : 0;
  std::vector<float> before(still, still + U * padded);
  if (later)
    for (int64_t i = 0; i < U * padded; i += LANES) {
      const Floats y = activation(load(still + i));
      std::memcpy(&before[i], &y, sizeof y);
    }
#pragma omp parallel num_threads(threads)
  {
    std::vector<Floats> memory((U + 2 * widest) * PAIR);
    Floats *const moved_units = memory.data(), *here = moved_units + U * PAIR, *there = here + widest * PAIR;
#pragma omp for collapse(2)
    for (int64_t first = 0; first < padded; first += TILE)
      for (int64_t j = 0; j < n; j++) {
        const auto move = later ? moves<activation> : moves<identity>;
        move(moved + (j * B + first) * U, B - first, U, before.data() + first, padded, moved_units);
        for (int64_t k = 0; k < K; k++) {
          const Floats* x = moved_units + k * G * PAIR;
          int64_t count = std::min(G, U - k * G);
          for (int64_t l = 0; l < later; l++) {
            const auto run = l + 1 < later ? layer<activation> : layer<identity>;
            run(x, count, weights[l] + (l ? 0 : k * G * sizes[l]), sizes[l], starts[l] + first, padded, here);
            x = here, count = sizes[l];
            std::swap(here, there);
          }
          for (int64_t b = first; b < std::min(first + TILE, B); b += LANES, x++) {
            const Floats f = kind == 0   ? cross_entropy(x, C, target + b, padded, scale)
                             : kind == 1 ? accuracy(x, C, target + b, padded)
                                         : linear(x, C, target + b, padded);
            for (int64_t i = 0; i < std::min<int64_t>(LANES, B - b); i++) out[(j * K + k) * B + b + i] = f[i];
          }
        }
      }
  }
}

}  // namespace

extern "C" {

int64_t tile() { return TILE; }

// Scores (n, K, B) of members that move one block of a layer's outputs each. moved (n, B, U) is what the layer
// wrote, still (U, padded) its unperturbed output; of the last layer, what is subtracted. Of each later layer: weights (I, O), sizes O, and starts (O, padded), to which the product of
// what has moved is added: the unperturbed output of the first later layer, of the others the bias.
// kind 0: cross-entropy with target (C, padded) at scale, 1: accuracy, 2: linear in what starts leaves
void members(int64_t threads, const float* moved, const float* still, int64_t n, int64_t B, int64_t padded,
             int64_t U, int64_t G, int64_t later, const float* const* weights, const float* const* starts,
             const int64_t* sizes, int64_t uses_gelu, int64_t kind, const float* target, const float* scale,
             float* out) {
  (uses_gelu ? score_members<gelu> : score_members<relu>)(threads, moved, still, n, B, padded, U, G, later, weights,
                                                         starts, sizes, kind, target, *scale, out);
}

}  // extern "C"
