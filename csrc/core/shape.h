// What a call needs to know about itself: sizes in chunks, and where every buffer lies.
#pragma once
#include "../festina.h"
#include "../simd/vec.h"

namespace ISA {

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Rows that a blocked matrix is given. 8 modulo 16, so that successive chunks of a column do not fall on one cache set.
INLINE long padded_rows(long rows) { return (rows + 7) / 16 * 16 + 8; }

// A blocked matrix: chunks of columns, in each all rows, in each row the chunk's columns. `rows` is padded.
template <class T> struct Blocked {
  using Element = T;
  T* data;
  long rows;
  INLINE T* at(long column_chunk, long row) const { return data + (column_chunk * rows + row) * chunk<T>; }
  INLINE long step() const { return rows * chunk<T>; }
};

// Hands out pieces of one buffer, each on a cache line; without a buffer it only counts.
struct Arena {
  char* base;
  uint64_t used;

  template <class T> T* take(long count) {
    T* piece = base ? (T*)(base + used) : nullptr;
    used += (uint64_t)(count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  template <class T> Blocked<T> take_blocked(long chunks, long rows) {
    rows = padded_rows(rows);
    return {take<T>(chunks * rows * chunk<T>), rows};
  }
};

constexpr long cache_line = 64;
constexpr int max_gates = 4;
constexpr int sum_of_c = 2 * max_gates;  // sums that a step takes over a row: one for each side and gate, then two of c
constexpr int max_sums = sum_of_c + 2;
constexpr long projected_rows = 128;     // steps are projected just before the recurrence needs them, about so many rows at once
constexpr long rows_a_group = 32;        // fewer rows a thread: threads share rows and split the units
constexpr long weights_a_thread = 3 << 19;  // bytes of recurrent weights: for each so many, one thread more shares the rows
constexpr long gradient_rows = 96;       // so many rows of a weight's gradient, or of the input's, are one task
constexpr long stretch_rows = 512;       // backward: so many rows of a group, or fewer, until gradients are summed over them

// What a cell and its plan ask of the buffers. `side` 0 is the product with x, 1 the product with h.
struct Traits {
  int gates, sides;
  bool has_c, is_parted, is_diagonal, is_normed[2], has_norm_c;
};

struct Shape {
  Traits traits;
  long T, B, I, H, P, N, directions, threads;
  long units, inputs, width;  // chunks of H, I and P
  int groups, group_of[max_gates];
  bool is_projected, is_centred, is_paired;  // products with weight_ih and weight_hh are of pairs of bfloat16
  double group_size[max_gates];

  long sums_saved() const {
    return groups * (traits.is_normed[0] + traits.is_normed[1]) + (traits.has_norm_c ? 2 : 0);
  }
  long columns() const { return traits.gates * units; }
  long depth(long terms) const { return is_paired ? ceil_div(terms, 2) : terms; }  // of a sum of so many terms
  // Threads that share rows, so that none goes through much more than weights_a_thread at every step.
  long sharers() const {
    return traits.is_diagonal ? 1 : max(1, columns() * depth(P) * cache_line / weights_a_thread);
  }
  long row_groups(long among) const { return max(1, min(among / sharers(), B / rows_a_group)); }
  long row_groups() const { return row_groups(threads); }
  long projected() const { return min(projected_rows, N); }
  long projected_slots() const { return row_groups() * projected() + B; }
  // Stretches of about even length, each of whole steps.
  long stretch() const {
    long groups = row_groups(), count = max(1, ceil_div(N, groups * stretch_rows));
    return min(N, ceil_div(N, groups * count) + ceil_div(B, groups));
  }
  long stretch_slots() const { return row_groups() * stretch() + B; }
  // Blocks of a weight's rows that are summed apart, by whomever: means do not depend on the number of threads.
  long mean_blocks() const { return max(1, min(16, traits.gates * H / 64)); }
  long list_rows() const { return B + max(projected_rows, gradient_rows); }
};

template <class T> Shape shape_of(const FestinaCall& call, const Traits& traits) {
  Shape s{};
  s.traits = traits;
  s.T = call.T, s.B = call.B, s.I = call.I, s.H = call.H, s.P = call.P, s.N = call.N;
  s.directions = call.directions, s.threads = call.threads;
  s.units = ceil_div(s.H, chunk<T>), s.inputs = ceil_div(s.I, chunk<T>), s.width = ceil_div(s.P, chunk<T>);
  s.is_projected = call.parameters[0][FESTINA_WEIGHT_HR] != nullptr;
  s.is_paired = has_dot_products && call.type == FESTINA_BFLOAT16;
  s.is_centred = call.placement != FESTINA_NO_NORM && !call.rms;
  for (int g = 0; g < traits.gates; ++g) {
    bool is_last = g == traits.gates - 1;
    s.group_of[g] = call.groups == FESTINA_EACH_GATE ? g : call.groups == FESTINA_LAST_APART && is_last && g > 0 ? 1 : 0;
    s.groups = s.group_of[g] + 1;
    s.group_size[s.group_of[g]] += s.H;
  }
  return s;
}

// Vectors lie together, unit after unit, so that a kernel finds all that it needs of a unit behind one pointer; their
// gradients lie alike. A column of products is numbered likewise: unit * gates + gate.
enum Vectors { gain_c = 4 * max_gates, shift_c, diagonal, valid, vectors_a_unit };  // valid: 1 below H, 0 past it
constexpr int gain_of(int side, int gate) { return 2 * (side * max_gates + gate); }
constexpr int shift_of(int side, int gate) { return gain_of(side, gate) + 1; }

// Vector `which` at hidden unit j.
template <class T> INLINE T& vector_at(T* vectors, int which, long j) {
  return vectors[(j / chunk<T> * vectors_a_unit + which) * chunk<T> + j % chunk<T>];
}

// Weights as the kernels take them, of one direction. Panels: [chunk of columns][row][column within the chunk], or of
// pairs [chunk of columns][two rows][column within the chunk][which row].
template <class T> struct Packed {
  T *input, *recurrent, *projection;                 // products of the forward pass
  T* vectors;  // [units, vectors_a_unit, chunk], zero past H
  T* inner;    // [columns, chunk]
};

template <class T> Packed<T> take_vectors(Arena& arena, const Shape& s) {
  Packed<T> p{};
  p.vectors = arena.take<T>(s.units * vectors_a_unit * chunk<T>);
  p.inner = arena.take<T>(s.columns() * chunk<T>);
  return p;
}

template <class T> Packed<T> take_packed(Arena& arena, const Shape& s) {
  Packed<T> p = take_vectors<T>(arena, s);
  p.input = arena.take<T>(s.columns() * s.depth(s.I) * chunk<T>);
  if (!s.traits.is_diagonal) p.recurrent = arena.take<T>(s.columns() * s.depth(s.P) * chunk<T>);
  if (s.is_projected) p.projection = arena.take<T>(s.width * s.H * chunk<T>);
  return p;
}

// Means over the rows of weight_ih and weight_hh that share statistics: [groups, columns of the weight].
template <class T> struct Means {
  T *input, *recurrent;
};

template <class T> Means<T> take_means(Arena& arena, const Shape& s) {
  if (!s.is_centred) return {};
  T* input = arena.take<T>(s.groups * s.I);
  return {input, s.traits.is_diagonal ? nullptr : arena.take<T>(s.groups * s.P)};
}

// What training leaves for backward, of one direction; rows are packed steps.
template <class T> struct Saved {
  Blocked<T> v[2];     // the products, centred, before gain and shift; one where both sides share a sum
  Blocked<T> c;        // before its norm and before Zoneout
  Blocked<T> carried;  // the state c after Zoneout, where there is one
  T* sums;             // [sums_saved, N]: 1 / sigma of each group of each normed side; mean and 1 / sigma of c
  Means<T> means;
};

template <class T> Saved<T> take_saved(Arena& arena, const Shape& s, bool has_zoneout_c) {
  Saved<T> saved{};
  for (int side = 0; side < s.traits.sides; ++side) saved.v[side] = arena.take_blocked<T>(s.columns(), s.N);
  if (s.traits.has_c) saved.c = arena.take_blocked<T>(s.units, s.N);
  if (s.traits.has_c && has_zoneout_c) saved.carried = arena.take_blocked<T>(s.units, s.N);
  saved.sums = arena.take<T>(s.sums_saved() * padded_rows(s.N));
  saved.means = take_means<T>(arena, s);
  return saved;
}

// Bytes that training leaves for backward after N packed steps: a constant and a multiple of padded_rows(N).
template <class T> uint64_t saved_bytes(Shape s, const FestinaCall& call, long N) {
  s.N = N;
  Arena count{nullptr, 0};
  for (long d = 0; d < s.directions; ++d) take_saved<T>(count, s, call.has_zoneout_cell);
  return count.used;
}

}  // namespace ISA
