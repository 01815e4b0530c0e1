// Best rates that this machine reaches, for the lower bounds of bounds.py: operands stay in registers and in
// the first cache. Every thread does `rounds` rounds; each function sets `done` to the operations of all.
#include "../eggroll/mlp_loops.cpp"

namespace {

constexpr int LENGTH = 64, BUFFER = 64;  // terms of a sum, vectors of a buffer
// HEIGHT x WIDTH sums hide the latency of a multiply-add, and stay in registers
constexpr int HEIGHT = LANES == 16 ? 12 : 6, WIDTH = 2;

// Stop the compiler from computing at compile time, or leaving out, what is read or written here
inline void touch(void* x) { asm volatile("" : : "r"(x) : "memory"); }

}  // namespace

extern "C" {

// Multiply-adds of floats: broadcast weights times vectors
void products(int64_t threads, int64_t rounds, int64_t* done) {
  *done = threads * rounds * LENGTH * HEIGHT * WIDTH * LANES;
#pragma omp parallel num_threads(threads)
  {
    float w[LENGTH][HEIGHT] = {};
    Floats x[LENGTH][WIDTH] = {}, sums[HEIGHT][WIDTH] = {};
    for (int64_t round = 0; round < rounds; round++) {
      touch(w), touch(x);
      for (int g = 0; g < LENGTH; g++)
        for (int i = 0; i < HEIGHT; i++)
          for (int v = 0; v < WIDTH; v++) sums[i][v] += w[g][i] * x[g][v];
    }
    touch(sums);
  }
}

// GELU from one buffer to another
void gelus(int64_t threads, int64_t rounds, int64_t* done) {
  *done = threads * rounds * BUFFER * LANES;
#pragma omp parallel num_threads(threads)
  {
    Floats x[BUFFER] = {}, y[BUFFER];
    for (int64_t round = 0; round < rounds; round++) {
      touch(x);
      for (int i = 0; i < BUFFER; i++) y[i] = gelu(x[i]);
      touch(y);
    }
  }
}

}  // extern "C"
