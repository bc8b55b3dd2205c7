// Sigmoid and tanh in ulps, NaN through both, products with every tail, transposed squares, digests, float16, saved bytes: one
// program for each instruction set, run by tests/cpu/test_kernels.py. Prints what failed; exits with 1 if anything did.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include VECTOR_HEADER
#include "../core/digest.h"
#include "../core/gemm.h"
#include "../core/kernels.h"
#include "../core/math.h"
#include "../core/panels.h"

namespace ISA {

int failures = 0;

template <class E> double ulps(E got, long double want) {
  E next = sizeof(E) == 4 ? (E)nextafterf((float)fabsl(want), INFINITY) : (E)nextafter((double)fabsl(want), INFINITY);
  return (double)(fabsl(got - want) / (next - (E)fabsl(want)));
}

// The largest error of a function over [-limit, limit], in steps that double towards zero as well.
template <class E, class Function, class Truth>
void check(const char* name, Function function, Truth truth, double limit, double allowed) {
  double worst = 0, worst_at = 0;
  auto at = [&](E x) {
    Twin<E> both = function(Twin<E>{broadcast(x), broadcast(-x)});
    double error = fmax(ulps(both.low.v[0], truth((long double)x)), ulps(both.high.v[0], truth(-(long double)x)));
    if (!(error <= worst)) worst = error, worst_at = (double)x;
  };
  for (int i = -200000; i <= 200000; ++i) at((E)(limit * i / 200000));
  for (double x = limit; x > 1e-30; x *= 0.97) at((E)x), at((E)-x);
  bool is_nan = isnan((double)function(broadcast((E)NAN)).v[0]);
  printf("%s<%zu>: %.2f ulp at %g%s\n", name, sizeof(E), worst, worst_at, is_nan ? "" : ", and loses NaN");
  failures += !(worst <= allowed) + !is_nan;
}

template <class E> void check_functions() {
  double limit = sizeof(E) == 4 ? 86 : 700;
  check<E>("sigmoid", [](auto x) { return sigmoid(x); }, [](long double x) { return 1 / (1 + expl(-x)); }, limit, 3.5);
  check<E>("tanh", [](auto x) { return tanh(x); }, [](long double x) { return tanhl(x); }, limit, 3);
}

template <class E> E* numbers(long count) {
  E* p = (E*)aligned_alloc(64, (count * sizeof(E) + 63) / 64 * 64);
  for (long i = 0; i < count; ++i) p[i] = (E)(rand() % 2001 - 1000) / 1000;
  return p;
}

// c [rows, chunks] += a [rows, depth] b, against plain loops. `k_stride` 1: rows of a one after the other; else a is blocked.
template <class E, int k_stride> void check_product(long rows, long chunks, long depth, bool is_added) {
  constexpr long C = chunk<E>;
  long across = padded_rows(k_stride == 1 ? rows : depth), columns = (chunks * C),
       blocks = ceil_div(k_stride == 1 ? depth : rows, C);
  E *a = numbers<E>(blocks * across * C), *b = numbers<E>(chunks * depth * C + C), *c = numbers<E>(rows * columns);
  E *before = numbers<E>(rows * columns), *squares = numbers<E>(2 * rows * lanes<E>);
  long *left = (long*)malloc(rows * sizeof(long)), *target = (long*)malloc(rows * sizeof(long));
  memcpy(before, c, rows * columns * sizeof(E));
  memset(squares, 0, 2 * rows * lanes<E> * sizeof(E));
  for (long r = 0; r < rows; ++r) {
    left[r] = k_stride == 1 ? r * C : r / C * across * C + r % C;
    target[r] = r * columns;
  }
  multiply<E, k_stride>({a, left, k_stride == 1 ? across * C : C * C}, rows, {b, depth * C}, chunks, depth, {c, target, C},
                        is_added, {squares, rows * lanes<E>, 2, 0, 0});
  for (long r = 0; r < rows; ++r) {
    double square[2] = {0, 0}, got[2] = {0, 0};
    for (long n = 0; n < columns; ++n) {
      double want = is_added ? before[r * columns + n] : 0, size = 1;
      for (long k = 0; k < depth; ++k) {
        double x = k_stride == 1 ? a[(k / C * across + r) * C + k % C] : a[left[r] + k * C];
        want += x * b[(n / C * depth + k) * C + n % C];
        size += fabs(x);
      }
      square[n / C % 2] += want * want;
      if (!(fabs(c[r * columns + n] - want) <= size * (sizeof(E) == 4 ? 1e-6 : 1e-14))) {
        printf("product<%zu> %ldx%ldx%ld k_stride %d: (%ld, %ld) is %g, not %g\n", sizeof(E), rows, chunks, depth, k_stride, r,
               n, (double)c[r * columns + n], want);
        ++failures;
        r = rows - 1, n = columns;
      }
    }
    for (int g = 0; g < 2; ++g) {
      for (int l = 0; l < lanes<E>; ++l) got[g] += squares[(g * rows + r) * lanes<E> + l];
      if (!(fabs(got[g] - square[g]) <= (1 + square[g]) * (sizeof(E) == 4 ? 1e-4 : 1e-12)))
        ++failures, printf("squares differ\n");
    }
  }
  free(a), free(b), free(c), free(before), free(squares), free(left), free(target);
}

template <class E> void check_products() {
  for (long rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 33})
    for (long chunks : {1, 2, 3, 4, 5, 7})
      for (long depth : {1, 2, 7, 15, 16, 17, 33, 256, 257, 300})
        for (bool is_added : {false, true}) {
          check_product<E, 1>(rows, chunks, depth, is_added);
          check_product<E, chunk<E>>(rows, chunks, depth, is_added);
        }
}

#ifdef HAS_DOT_PRODUCTS
// Pairs of bfloat16: the same sums as of floats that hold the same numbers, whether depth is even or odd.
void check_pairs(long rows, long chunks, long depth) {
  constexpr long C = chunk<float>;
  long across = padded_rows(rows), pairs = ceil_div(depth, 2), columns = chunks * C;
  float *c = numbers<float>(rows * columns), *given = numbers<float>(depth * (rows + columns));
  Two *a = (Two*)calloc(ceil_div(pairs, C) * across * C, sizeof(Two)), *b = (Two*)calloc(chunks * pairs * C, sizeof(Two));
  long *left = (long*)malloc(rows * sizeof(long)), *target = (long*)malloc(rows * sizeof(long));
  auto half = [&](long i) { return to_bfloat16(given[i]); };
  for (long r = 0; r < rows; ++r) {
    left[r] = r * C, target[r] = r * columns;
    for (long k = 0; k < depth; ++k) ((uint16_t*)(a + (k / 2 / C * across + r) * C + k / 2 % C))[k % 2] = half(r * depth + k);
  }
  for (long n = 0; n < columns; ++n)
    for (long k = 0; k < depth; ++k)
      ((uint16_t*)(b + (n / C * pairs + k / 2) * C + n % C))[k % 2] = half((rows + n) * depth + k);
  multiply<Two>({a, left, across * C}, rows, {b, pairs * C}, chunks, pairs, {c, target, C}, false);
  for (long i = 0; i < rows * columns; ++i) {
    double want = 0;
    for (long k = 0; k < depth; ++k)
      want += (double)from_bfloat16(half(i / columns * depth + k)) * from_bfloat16(half((rows + i % columns) * depth + k));
    if (!(fabs(c[i] - want) <= 1e-6 * depth)) {
      printf("pairs %ldx%ldx%ld: %ld is %g, not %g\n", rows, chunks, depth, i, (double)c[i], want), ++failures;
      break;
    }
  }
  free(a), free(b), free(c), free(given), free(left), free(target);
}

void check_all_pairs() {
  for (long rows : {1, 2, 3, 7, 13})
    for (long chunks : {1, 2, 5})
      for (long depth : {1, 2, 15, 32, 33, 600}) check_pairs(rows, chunks, depth);
}
#else
void check_all_pairs() {}
#endif

// Rounded weights, as fill_panel lays them out: the same sums as of the numbers that they stand for.
template <class W> void check_words(long rows, long chunks, long depth, bool is_added) {
  constexpr long C = chunk<float>, lines = terms<float, W>;
  constexpr bool is_int8 = has_scales<W>;
  long across = padded_rows(rows), columns = chunks * C, in_panel = is_int8 + ceil_div(depth, lines);
  float *a = numbers<float>(ceil_div(depth, C) * across * C), *c = numbers<float>(rows * columns);
  float *weights = numbers<float>(columns * depth), *before = numbers<float>(rows * columns);
  W* b = (W*)numbers<float>(chunks * in_panel * C);
  long *left = (long*)malloc(rows * sizeof(long)), *target = (long*)malloc(rows * sizeof(long));
  memcpy(before, c, rows * columns * sizeof(float));
  for (long i = 0; i < columns; ++i) weights[i * depth] *= (float)(i % 5);  // rows of other sizes, one of zeros if depth is 1
  for (long r = 0; r < rows; ++r) left[r] = r * C, target[r] = r * columns;
  for (long r = 0; depth % C && r < rows; ++r)  // what lies behind the last term is not read
    for (long l = depth % C; l < C; ++l) a[(depth / C * across + r) * C + l] = NAN;
  FestinaCall call{};
  Shape s = shape_of<float>(call, Traits{});
  s.panel_type = is_int8 ? FESTINA_INT8_PANELS : FESTINA_BFLOAT16_PANELS;
  Weight<float> w{Tensor<float>(weights, FESTINA_FLOAT32), 1, columns, depth, nullptr, 0};
  for (long n = 0; n < chunks; ++n) fill_panel(s, w, false, n, (float*)(b + n * in_panel * C));
  multiply<float, 1, W>({a, left, across * C}, rows, {b + is_int8 * C, in_panel * C}, chunks, depth, {c, target, C}, is_added);
  for (long i = 0; i < rows * columns; ++i) {
    double want = is_added ? before[i] : 0;
    float most = 0;
    const float* row = weights + i % columns * depth;
    for (long k = 0; k < depth; ++k) most = fmaxf(most, fabsf(row[k]));
    float unit = most / 127;  // in float: halves are rounded as it says
    for (long k = 0; k < depth; ++k) {
      double rounded = !is_int8 ? from_bfloat16(to_bfloat16(row[k])) : unit > 0 ? (double)nearbyintf(row[k] / unit) * unit : 0;
      want += a[(k / C * across + i / columns) * C + k % C] * rounded;
    }
    if (!(fabs(c[i] - want) <= 1e-6 * (depth + 2))) {
      printf("words of %ld terms %ldx%ldx%ld: %ld is %g, not %g\n", lines, rows, chunks, depth, i, (double)c[i], want);
      ++failures;
      break;
    }
  }
  free(a), free(b), free(c), free(weights), free(before), free(left), free(target);
}

void check_all_words() {
  for (long rows : {1, 2, 3, 5, 6, 7, 8, 13})
    for (long chunks : {1, 2, 3, 4, 5})
      for (long depth : {1, 2, 3, 15, 16, 17, 33, 256, 257, 600})
        for (bool is_added : {false, true}) {
          check_words<Two>(rows, chunks, depth, is_added);
          check_words<Four>(rows, chunks, depth, is_added);
        }
}

// The number that is nearest to x in float16, ties to even.
double in_float16(double x) {
  if (x == 0 || !isfinite(x)) return x;
  double step = ldexp(1, (int)fmax(ilogb(x), -14) - 10), rounded = nearbyint(x / step) * step;
  return fabs(rounded) < 65536 ? rounded : copysign(INFINITY, x);
}

bool is_same(double a, double b) { return a == b ? signbit(a) == signbit(b) : isnan(a) && isnan(b); }

// float16, one number at a time and a chunk at once: every number of it, and the floats around every halfway point.
void check_float16() {
  constexpr int C = chunk<float>;
  long failed = 0;
  auto goes_to = [&](float x) {
    float given[C], got[C];
    Half stored[C];
    for (int l = 0; l < C; ++l) given[l] = l % 2 ? -x : x;
    narrow(FESTINA_FLOAT16, given, stored);
    widen(FESTINA_FLOAT16, stored, got);
    double want = in_float16(x), alone = from_float16(to_float16(x));
    for (int l = 0; l < C; ++l) failed += !is_same(l % 2 ? -got[l] : got[l], want);
    failed += !is_same(alone, want);
  };
  for (uint32_t bits = 0; bits < 0x8000; ++bits) {
    int exponent = bits >> 10, mantissa = bits & 0x3ff;
    double want = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : ldexp(exponent ? mantissa + 1024 : mantissa, (exponent ? exponent : 1) - 25);
    float x = from_float16((uint16_t)bits);
    failed += !is_same(x, want) + !is_same(from_float16((uint16_t)(bits | 0x8000)), -want);
    if (exponent == 31 && mantissa) {
      goes_to(x);
      continue;
    }
    float halfway = exponent == 31 ? 65520 : (x + from_float16((uint16_t)(bits == 0x7bff ? bits : bits + 1))) / 2;
    for (float y : {x, nextafterf(x, 0), nextafterf(x, INFINITY), halfway, nextafterf(halfway, 0), nextafterf(halfway, 1e9f)})
      goes_to(y);
  }
  for (float x : {65503.0f, 65519.99f, 65536.0f, 1e30f, 1e-30f, 1e-40f, INFINITY}) goes_to(x);
  for (int i = 0; i < 100000; ++i) goes_to(float_of((uint32_t)rand() << 1 ^ (uint32_t)rand()));
  if (failed) printf("float16: %ld conversions differ\n", failed), ++failures;
}

template <class E> void check_transposition() {
  constexpr int C = chunk<E>;
  E from[C * C], to[C * C];
  for (int i = 0; i < C * C; ++i) from[i] = (E)i;
  transpose_block(from, to);
  for (int i = 0; i < C * C; ++i)
    if (to[i] != from[i % C * C + i / C]) {
      printf("transposed<%zu>: %d is %g\n", sizeof(E), i, (double)to[i]), ++failures;
      break;
    }
}

// Every bit counts, wherever it stands; and so do the signs of all values together.
void check_digest() {
  alignas(64) unsigned char bytes[300];
  for (unsigned char& byte : bytes) byte = (unsigned char)rand();
  for (long count : {1, 4, 31, 127, 128, 129, 300}) {
    uint64_t before = digest(bytes, count), lost = 0;
    for (long bit = 0; bit < 8 * count; ++bit) {
      bytes[bit / 8] ^= 1 << bit % 8;
      lost += digest(bytes, count) == before;
      bytes[bit / 8] ^= 1 << bit % 8;
    }
    for (long i = 3; i < count; i += 4) bytes[i] ^= 128;
    lost += count > 3 && digest(bytes, count) == before;
    for (long i = 3; i < count; i += 4) bytes[i] ^= 128;
    if (lost) printf("digest of %ld bytes: %ld changes are lost\n", count, (long)lost), ++failures;
  }
}

// The bound that callers allocate by holds for every N, and is reached.
template <class E> void check_saved(const char* name, int64_t placement, const Traits& traits) {
  for (int options = 0; options < 32; ++options) {
    FestinaCall call{};
    call.placement = placement, call.rms = options & 1, call.groups = options & 2 ? FESTINA_EACH_GATE : FESTINA_ALL;
    call.directions = options & 4 ? 2 : 1, call.has_zoneout_cell = options & 8;
    call.H = options & 16 ? 48 : 17, call.I = 5, call.P = call.H, call.threads = 1;
    Shape s = shape_of<E>(call, traits);
    SavedBound bound = saved_bound<E>(s, call);
    for (long N = 0; N < 100000; N += N < 300 ? 1 : 997) {
      uint64_t need = saved_bytes<E>(s, call, N), most = bound.fixed + (uint64_t)N * bound.per_row;
      if (need <= most && (N % 16 != 9 || need == most)) continue;
      printf("saved<%zu> %s, options %d: N = %ld takes %ld bytes of %ld\n", sizeof(E), name, options, N, (long)need,
             (long)most);
      ++failures;
      break;
    }
  }
}

template <class E> void check_all_saved() {
#define KERNEL(cell, placement, cell_norm, Cell) \
  check_saved<E>(#cell " " #placement " " #cell_norm, placement, KernelsOf<E, Cell, placement, cell_norm>::type::traits);
#include "../kernels.inc"
#undef KERNEL
}

int run() {
  check_digest();
  check_all_saved<float>();
  check_all_saved<double>();
  check_transposition<float>();
  check_transposition<double>();
  check_all_pairs();
  check_all_words();
  check_float16();
  check_functions<float>();
  check_functions<double>();
  check_products<float>();
  check_products<double>();
  return failures;
}

}  // namespace ISA

int main() { return ISA::run() ? 1 : 0; }
