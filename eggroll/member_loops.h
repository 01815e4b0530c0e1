// The loop over an MLP's members on a CPU, for any arithmetic: no activation goes to memory.
// Vector extensions of GCC and Clang: one source for AVX-512, AVX2 and NEON. Lanes are examples.
// Shapes: n directions, K blocks, G units of a block, B examples, O outputs of a layer, C classes.
// A row of `padded` examples is B of them and zeros, a multiple of TILE.
//
// An Arithmetic has:
//   Number, Vector              what layers write, of 4 bytes, and LANES of them
//   UNITS                       units of a layer whose inputs to the next one share a Vector
//   active(units), less(x, y)   inputs of UNITS units of the perturbed layer, and their difference
//   multiply_add(sum, x, w)     sum + inputs x times weights w of UNITS units
//   hidden(sums, l)             inputs of UNITS units of the later layer l
//   last(sum, l)                an output of the last layer
//   score(y, C, b)              scores of the outputs y (C, PAIR) of the vector of examples at b
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 10;  // numbers of a vector, and outputs whose sums stay in registers
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

inline Ints load(const int32_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The first `count` numbers, and zeros
template <class Number>
inline auto load(const Number* from, int64_t count) {
  if (count == LANES) return load(from);
  decltype(load(from)) x = {};
  for (int64_t i = 0; i < count; i++) x[i] = from[i];
  return x;
}

// ---- examples to lanes ----

template <int S, class Vector, int... I>
inline void exchange(Vector& x, Vector& y, std::integer_sequence<int, I...>) {
  const Vector a = x, b = y;
  x = Vector{(I & S ? b[I & ~S] : a[I])...};
  y = Vector{(I & S ? b[I] : a[I | S])...};
}

// Transpose (LANES, LANES), by exchanging blocks of S
template <int S = 1, class Vector>
inline void transpose(Vector* rows) {
  if constexpr (S < LANES) {
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i | S], std::make_integer_sequence<int, LANES>());
    transpose<2 * S>(rows);
  }
}

// ---- layers ----

// y = what follows from start (N, padded) + w (count, O) x (count, TILE), of N outputs of layer l
template <int N, bool HIDDEN, class Arithmetic, class Vector, class Number>
inline void product(const Arithmetic& arithmetic, int64_t l, const Vector* x, int64_t count, const Number* w,
                    int64_t O, const Number* start, int64_t padded, Vector* y) {
  constexpr int UNITS = HIDDEN ? Arithmetic::UNITS : 1;
  Vector sums[N][PAIR];
  for (int i = 0; i < N; i++)
    for (int v = 0; v < PAIR; v++) sums[i][v] = load(start + i * padded + v * LANES);
  for (int64_t g = 0; g < count; g++, x += PAIR, w += O)
    for (int i = 0; i < N; i++)
      for (int v = 0; v < PAIR; v++) sums[i][v] = arithmetic.multiply_add(sums[i][v], x[v], w[i]);
  for (int i = 0; i < N; i += UNITS)
    for (int v = 0; v < PAIR; v++) {
      Vector units[UNITS] = {};
      for (int u = 0; u < std::min(UNITS, N - i); u++) units[u] = sums[i + u][v];
      if constexpr (HIDDEN) *y++ = arithmetic.hidden(units, l);
      else *y++ = arithmetic.last(units[0], l);
    }
}

template <bool HIDDEN, class Arithmetic, class Vector, class Number>
void layer(const Arithmetic& arithmetic, int64_t l, const Vector* x, int64_t count, const Number* w, int64_t O,
           const Number* start, int64_t padded, Vector* y) {
  int64_t o = 0;
  const auto next = [&](auto outputs) {
    constexpr int N = decltype(outputs)::value;
    Vector* to = y + o / (HIDDEN ? Arithmetic::UNITS : 1) * PAIR;
    product<N, HIDDEN>(arithmetic, l, x, count, w + o, O, start + o * padded, padded, to);
    o += N;
  };
  while (o + ROWS <= O) next(std::integral_constant<int, ROWS>());
  while (o + 2 <= O) next(std::integral_constant<int, 2>());
  while (o < O) next(std::integral_constant<int, 1>());
}

// ---- scores ----

// The target (C, padded) of the first of the largest outputs y (C, PAIR)
template <class Vector, class Number>
inline Vector first_of_largest(const Vector* y, int64_t C, const Number* target, int64_t padded) {
  Vector top = y[0], hit = load(target);
  for (int64_t c = 1; c < C; c++) {
    const Ints larger = y[c * PAIR] > top;
    hit = larger ? load(target + c * padded) : hit;
    top = larger ? y[c * PAIR] : top;
  }
  return hit;
}

// ---- members ----

// Members that move one block of a layer's outputs each, and scores (n, K, B)
template <class Number>
struct Members {
  int64_t threads, n, B, padded, U, G, later;
  const Number *moved, *still;  // (n, B, U), and (U, padded)
  // of each later layer: (I / UNITS, O), (O, padded), and O
  const Number *const *weights, *const *starts;
  const int64_t* sizes;
  Number* out;
};

template <class Arithmetic>
class MemberLoops {
  using Number = typename Arithmetic::Number;
  using Vector = typename Arithmetic::Vector;
  static constexpr int UNITS = Arithmetic::UNITS;

  const Arithmetic arithmetic;
  const Members<Number> m;

  static int64_t vectors(int64_t units) { return (units + UNITS - 1) / UNITS; }

  // How far the inputs of the next layer moved from `before` (or the outputs, of the last), by examples x (, U)
  template <bool HIDDEN>
  void moves(const Number* x, int64_t examples, const Number* before, Vector* to) const {
    for (int v = 0; v < PAIR; v++)
      for (int64_t o = 0; o < m.U; o += LANES) {
        const int64_t width = std::min<int64_t>(LANES, m.U - o);
        Vector rows[LANES] = {};
        for (int64_t i = 0; i < std::min<int64_t>(LANES, examples - v * LANES); i++)
          rows[i] = load(x + (v * LANES + i) * m.U + o, width);
        transpose(rows);
        for (int64_t i = 0; i < width; i += HIDDEN ? UNITS : 1) {
          const int64_t at = HIDDEN ? (o + i) / UNITS : o + i;
          const Vector y = load(before + at * m.padded + v * LANES);
          if constexpr (HIDDEN) to[at * PAIR + v] = arithmetic.less(arithmetic.active(rows + i), y);
          else to[at * PAIR + v] = rows[i] - y;
        }
      }
  }

  // Inputs (U / UNITS, padded) of the next layer where nothing moved
  std::vector<Number> unperturbed() const {
    std::vector<Number> inputs(vectors(m.U) * m.padded);
    for (int64_t o = 0; o < m.U; o += UNITS)
      for (int64_t b = 0; b < m.padded; b += LANES) {
        Vector units[UNITS] = {};
        for (int64_t i = 0; i < std::min<int64_t>(UNITS, m.U - o); i++)
          units[i] = load(m.still + (o + i) * m.padded + b);
        const Vector y = arithmetic.active(units);
        std::memcpy(&inputs[o / UNITS * m.padded + b], &y, sizeof y);
      }
    return inputs;
  }

  // Outputs (C, PAIR) of a member that moved the units x of block k; here and there are free memory
  const Vector* outputs(int64_t first, int64_t k, const Vector* x, Vector* here, Vector* there) const {
    int64_t count = vectors(std::min(m.G, m.U - k * m.G));
    for (int64_t l = 0; l < m.later; l++) {
      const auto run = l + 1 < m.later ? layer<true, Arithmetic, Vector, Number>
                                       : layer<false, Arithmetic, Vector, Number>;
      const Number* w = m.weights[l] + (l ? 0 : k * m.G / UNITS * m.sizes[l]);
      run(arithmetic, l, x, count, w, m.sizes[l], m.starts[l] + first, m.padded, here);
      x = here, count = vectors(m.sizes[l]);
      std::swap(here, there);
    }
    return x;
  }

  // Scores of all blocks of direction j, on the tile at example `first`
  void direction(int64_t first, int64_t j, const Number* before, Vector* memory) const {
    const int64_t K = (m.U + m.G - 1) / m.G, C = m.later ? m.sizes[m.later - 1] : m.U;
    Vector *const here = memory + m.U * PAIR, *const there = here + widest() * PAIR;
    const auto move = m.later ? &MemberLoops::moves<true> : &MemberLoops::moves<false>;
    (this->*move)(m.moved + (j * m.B + first) * m.U, m.B - first, before + first, memory);
    for (int64_t k = 0; k < K; k++) {
      const int64_t at = m.later ? k * m.G / UNITS : k * m.G;
      const Vector* y = outputs(first, k, memory + at * PAIR, here, there);
      for (int64_t b = first; b < std::min(first + TILE, m.B); b += LANES, y++) {
        const Vector f = arithmetic.score(y, C, b);
        Number* to = m.out + (j * K + k) * m.B + b;
        for (int64_t i = 0; i < std::min<int64_t>(LANES, m.B - b); i++) to[i] = f[i];
      }
    }
  }

  int64_t widest() const { return m.later ? *std::max_element(m.sizes, m.sizes + m.later) : 0; }

 public:
  MemberLoops(const Arithmetic& arithmetic, const Members<Number>& members) : arithmetic(arithmetic), m(members) {}

  void run() const {
    const std::vector<Number> inputs = m.later ? unperturbed() : std::vector<Number>();
    const Number* before = m.later ? inputs.data() : m.still;
#pragma omp parallel num_threads(m.threads)
    {
      std::vector<Vector> memory((m.U + 2 * widest()) * PAIR);
#pragma omp for collapse(2)
      for (int64_t first = 0; first < m.padded; first += TILE)
        for (int64_t j = 0; j < m.n; j++) direction(first, j, before, memory.data());
    }
  }
};

}  // namespace

extern "C" int64_t tile() { return TILE; }
