// Scores of an MLP's members in float32 on a CPU: see mlp_loops.py and member_loops.h.
#include "member_loops.h"

namespace {

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

inline Floats sign(Floats x) { return x > 0.0f ? Floats{} + 1.0f : x < 0.0f ? Floats{} - 1.0f : Floats{}; }

// relu(x) - t Phi(-t), t = |x|, where log2 Phi(-t) is nearly a polynomial: to 7e-7
inline Floats gelu(Floats x) {
  const Floats size = x < 0.0f ? -x : x, t = size > 6.0f ? Floats{} + 6.0f : size;
  Floats y = t * -0.0004732941451948136f + 0.007084462326020002f;
  y = (y * t - 0.051827169954776764f) * t - 0.4599926471710205f;
  y = (y * t - 1.1507878303527832f) * t - 1.000037670135498f;
  return relu(x) - t * exp2(y);
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

// y times target
inline Floats linear(const Floats* y, int64_t C, const float* target, int64_t padded) {
  Floats total = {};
  for (int64_t c = 0; c < C; c++) total += y[c * PAIR] * load(target + c * padded);
  return total;
}

using Activation = Floats (*)(Floats);

// What follows the outputs of the last layer
struct Score {
  int64_t kind;  // 0: cross-entropy at scale, 1: accuracy, 2: linear
  const float* target;  // (C, padded)
  int64_t padded;
  float scale;
};

template <Activation activation>
struct FloatArithmetic {
  using Number = float;
  using Vector = Floats;
  static constexpr int UNITS = 1;
  const Score by;

  static Floats multiply_add(Floats sum, Floats x, float w) { return sum + w * x; }
  static Floats active(const Floats* units) { return activation(units[0]); }
  static Floats less(Floats x, Floats y) { return x - y; }
  static Floats hidden(const Floats* sums, int64_t) { return activation(sums[0]); }
  static Floats last(Floats sum, int64_t) { return sum; }

  Floats score(const Floats* y, int64_t C, int64_t b) const {
    const float* target = by.target + b;
    return by.kind == 0   ? cross_entropy(y, C, target, by.padded, by.scale)
           : by.kind == 1 ? first_of_largest(y, C, target, by.padded)
                          : linear(y, C, target, by.padded);
  }
};

}  // namespace

extern "C" {

// Scores (n, K, B) of members that move one block of a layer's outputs each. moved (n, B, U) is what the layer
// wrote, still (U, padded) its unperturbed output; of the last layer, what is subtracted. Of each later layer:
// weights (I, O), sizes O, and starts (O, padded), to which the product of what has moved is added: the
// unperturbed output of the first later layer, of the others the bias.
void members(int64_t threads, const float* moved, const float* still, int64_t n, int64_t B, int64_t padded,
             int64_t U, int64_t G, int64_t later, const float* const* weights, const float* const* starts,
             const int64_t* sizes, int64_t activation, int64_t kind, const float* target, const float* scale,
             float* out) {
  const Members<float> all{threads, n, B, padded, U, G, later, moved, still, weights, starts, sizes, out};
  const Score by{kind, target, padded, *scale};
  if (activation == 0) MemberLoops<FloatArithmetic<gelu>>({by}, all).run();
  else if (activation == 1) MemberLoops<FloatArithmetic<relu>>({by}, all).run();
  else MemberLoops<FloatArithmetic<sign>>({by}, all).run();
}

}  // extern "C"
