// The sizes of a call, and the layout of buffers that outlive a pass: panels and what training saves.
#pragma once
#include "../festina.h"
#include "../simd/vec.h"

namespace ISA {

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Rows allocated for a blocked matrix: 8 modulo 16, so that successive chunks of a column do not fall on one cache set.
INLINE long padded_rows(long rows) { return (rows + 7) / 16 * 16 + 8; }

// A blocked matrix: chunks of columns, in each all rows, in each row the chunk's columns. `rows` is padded.
template <class E> struct Blocked {
  using Element = E;
  E* data;
  long rows;
  INLINE E* at(long column_chunk, long row) const { return data + (column_chunk * rows + row) * chunk<E>; }
  INLINE long stride() const { return rows * chunk<E>; }
};

// Hands out pieces of one buffer, each on a cache line; without a buffer it only counts.
struct Arena {
  char* base;
  uint64_t used;

  template <class E> E* take(long count) {
    E* piece = base ? (E*)(base + used) : nullptr;
    used += (uint64_t)(count * sizeof(E) + 63) / 64 * 64;
    return piece;
  }
  template <class E> Blocked<E> take_blocked(long chunks, long rows) {
    rows = padded_rows(rows);
    return {take<E>(chunks * rows * chunk<E>), rows};
  }
};

constexpr long cache_line = 64;
constexpr int max_gates = 4;
constexpr int sum_of_c = 2 * max_gates;  // a step's sums over a row: one for each side and gate, then two of c
constexpr int max_sums = sum_of_c + 2;
constexpr long input_product_rows = 128;    // the input product is taken for about this many rows at once, just before use
constexpr long rows_a_team = 32;            // with fewer rows a thread, threads share rows and split H
constexpr long weights_a_thread = 3 << 19;  // bytes of recurrent weights; a team has a thread for each
constexpr long gradient_rows = 96;          // rows of a weight's gradient, or of the input's, in one task
constexpr long most_segment_rows = 512;     // backward: rows of a team after which gradients are summed, at most

// Properties of a cell under a plan. Side 0 is the input product, side 1 the recurrent product; with one side, both products
// are summed in one place.
struct Traits {
  int gates, sides;
  bool has_c, has_split_candidate, is_diagonal, is_normed[2], has_norm_c;
  // The reset gate multiplies the last gate's recurrent product before its norm, which is then that of an inner value, as c's.
  bool has_early_reset;
  bool has_gated_h;  // the last gate's recurrent product takes in a gated h

  bool has_inner() const { return has_c || has_norm_c; }
  // Gates whose norm takes in a product of this side as it is; the others' recurrent weights are not centred.
  int normed_gates(int side) const {
    return !is_normed[side] ? 0 : has_early_reset && side == is_normed[1] ? gates - 1 : gates;
  }
  int centred_gates() const { return has_early_reset ? gates - 1 : gates; }
  // Gates whose recurrent product takes in h itself.
  int plain_gates() const { return has_gated_h ? gates - 1 : gates; }
  // Both products of all gates but the last are summed in side 0, and the last gate's recurrent product is alone in side 1.
  bool has_split_sum() const { return has_early_reset && is_normed[0] && !is_normed[1]; }
};

struct Shape {
  Traits traits;
  long T, B, I, H, P, N, directions, threads;
  long H_chunks, I_chunks, P_chunks;
  int groups, group_of[max_gates];           // of gates that share statistics
  bool is_projected, is_centred, is_paired;  // is_paired: both products take pairs of bfloat16
  int64_t panel_type;
  double group_size[max_gates];

  long sums_saved() const { return groups * (traits.is_normed[0] + traits.is_normed[1]) + (traits.has_norm_c ? 2 : 0); }
  long columns() const { return traits.gates * H_chunks; }
  // About as many multiplications as a step of so many rows costs: those of the product, and the functions of each gate.
  long work(long rows) const { return rows * traits.gates * H * ((traits.is_diagonal ? 0 : P) + 32); }
  long depth(long terms) const { return is_paired ? ceil_div(terms, 2) : terms; }  // of a product that sums `terms` terms
  bool is_rounded() const { return panel_type != FESTINA_WHOLE_PANELS; }
  // Rows of a panel for `terms` terms. The first of int8 has the factors of its columns.
  long scale_rows() const { return panel_type == FESTINA_INT8_PANELS; }
  long panel_rows(long terms) const {
    if (panel_type == FESTINA_INT8_PANELS) return scale_rows() + ceil_div(terms, 4);
    return panel_type == FESTINA_BFLOAT16_PANELS ? ceil_div(terms, 2) : depth(terms);
  }
  long projection_rows() const { return is_rounded() ? panel_rows(H) : H; }
  long pair_chunks() const { return ceil_div(H_chunks, 2); }  // of one gate's columns
  // Threads of a team, so that none reads much more than weights_a_thread at every step.
  long team_size() const { return traits.is_diagonal ? 1 : max(1, columns() * depth(P) * cache_line / weights_a_thread); }
  long teams(long among) const { return max(1, min(among / team_size(), B / rows_a_team)); }
  long teams() const { return teams(threads); }
  long product_rows() const { return min(input_product_rows, N); }
  long product_buffer_rows() const { return teams() * product_rows() + B; }
  // Segments of about even length, each of whole steps.
  long segment_rows() const {
    long parts = teams(), count = max(1, ceil_div(N, parts * most_segment_rows));
    return min(N, ceil_div(N, parts * count) + ceil_div(B, parts));
  }
  long segment_slots() const { return teams() * segment_rows() + B; }
  // Blocks of a weight's rows, summed one by one, by any thread: means do not depend on the number of threads.
  long mean_blocks() const { return max(1, min(16, traits.gates * H / 64)); }
  long scratch_rows() const { return B + max(input_product_rows, gradient_rows); }
};

template <class E> Shape shape_of(const FestinaCall& call, const Traits& traits) {
  Shape s{};
  s.traits = traits;
  s.T = call.T, s.B = call.B, s.I = call.I, s.H = call.H, s.P = call.P, s.N = call.N;
  s.directions = call.directions, s.threads = call.threads;
  s.H_chunks = ceil_div(s.H, chunk<E>), s.I_chunks = ceil_div(s.I, chunk<E>), s.P_chunks = ceil_div(s.P, chunk<E>);
  s.is_projected = call.parameters[0][FESTINA_WEIGHT_HR] != nullptr;
  s.is_paired = has_dot_products && call.type == FESTINA_BFLOAT16;
  s.panel_type = call.panel_type;
  s.is_centred = call.placement != FESTINA_NO_NORM && !call.rms;
  for (int g = 0; g < traits.gates; ++g) {
    bool is_last = g == traits.gates - 1;
    s.group_of[g] = call.groups == FESTINA_EACH_GATE ? g : call.groups == FESTINA_LAST_APART && is_last && g > 0 ? 1 : 0;
    s.groups = s.group_of[g] + 1;
    s.group_size[s.group_of[g]] += s.H;
  }
  return s;
}

// All vectors of one chunk of H lie together, so that a kernel reaches them by one pointer; their gradients likewise. Chunk n
// of H has product columns [n * gates, (n + 1) * gates), in chunks.
enum Vectors { gain_c = 4 * max_gates, shift_c, diagonal, valid, vectors_a_chunk };  // valid: 1 below H, 0 past it
constexpr int gain_of(int side, int gate) { return 2 * (side * max_gates + gate); }
constexpr int shift_of(int side, int gate) { return gain_of(side, gate) + 1; }

// Vector `which` at hidden unit j.
template <class E> INLINE E& vector_at(E* vectors, int which, long j) {
  return vectors[(j / chunk<E> * vectors_a_chunk + which) * chunk<E> + j % chunk<E>];
}

// Means over the rows of weight_ih and weight_hh that share statistics: [groups, columns of the weight].
template <class E> struct Means {
  E *input, *recurrent;
};

template <class E> Means<E> take_means(Arena& arena, const Shape& s) {
  if (!s.is_centred) return {};
  E* input = arena.take<E>(s.groups * s.I);
  return {input, s.traits.is_diagonal ? nullptr : arena.take<E>(s.groups * s.P)};
}

// The weights of one direction in the order in which the kernels read them: [chunk of columns][row][column within the chunk],
// or of pairs [chunk of columns][two rows][column within the chunk][which row]. So are weights in bfloat16, and four rows of int8.
template <class E> struct Panels {
  E *input, *recurrent, *projection;
  E* vectors;      // [H_chunks, vectors_a_chunk, chunk], zero past H
  E* inner[2];     // of each side, [columns, chunk]: what is added to the product before its norm
  Means<E> means;  // forward: what the weights were centred by
};

template <class E> Panels<E> take_vectors(Arena& arena, const Shape& s) {
  Panels<E> p{};
  p.vectors = arena.take<E>(s.H_chunks * vectors_a_chunk * chunk<E>);
  for (int side = 0; side < s.traits.sides; ++side) p.inner[side] = arena.take<E>(s.columns() * chunk<E>);
  return p;
}

template <class E> Panels<E> take_panels(Arena& arena, const Shape& s) {
  Panels<E> p = take_vectors<E>(arena, s);
  p.input = arena.take<E>(s.columns() * s.panel_rows(s.I) * chunk<E>);
  if (!s.traits.is_diagonal) p.recurrent = arena.take<E>(s.columns() * s.panel_rows(s.P) * chunk<E>);
  if (s.is_projected) p.projection = arena.take<E>(s.P_chunks * s.projection_rows() * chunk<E>);
  p.means = take_means<E>(arena, s);
  return p;
}

// What training saves for backward, of one direction; rows are packed steps.
template <class E> struct Saved {
  Blocked<E> v[2];     // the products of each side, centred, before gain and shift
  Blocked<E> c;        // or the candidate: before its norm, before the clip, and before Zoneout
  Blocked<E> carried;  // the state c after Zoneout, if active
  E* sums;             // [sums_saved, N]: 1 / sigma of each group of each normed side; mean and 1 / sigma of c
  Means<E> means;
};

template <class E> Saved<E> take_saved(Arena& arena, const Shape& s, bool has_zoneout_c) {
  Saved<E> saved{};
  for (int side = 0; side < s.traits.sides; ++side) saved.v[side] = arena.take_blocked<E>(s.columns(), s.N);
  if (s.traits.has_inner()) saved.c = arena.take_blocked<E>(s.H_chunks, s.N);
  if (s.traits.has_c && has_zoneout_c) saved.carried = arena.take_blocked<E>(s.H_chunks, s.N);
  saved.sums = arena.take<E>(s.sums_saved() * padded_rows(s.N));
  saved.means = take_means<E>(arena, s);
  return saved;
}

// Bytes that training saves for N packed steps: a constant, and a multiple of padded_rows(N).
template <class E> uint64_t saved_bytes(Shape s, const FestinaCall& call, long N) {
  s.N = N;
  Arena count{nullptr, 0};
  for (long d = 0; d < s.directions; ++d) take_saved<E>(count, s, call.has_zoneout_cell);
  return count.used;
}

// saved_bytes for any N is at most fixed + N * per_row, since padded_rows(N) <= padded_rows(1) + 7 + N.
struct SavedBound {
  uint64_t fixed, per_row;
};

template <class E> SavedBound saved_bound(const Shape& s, const FestinaCall& call) {
  uint64_t one = saved_bytes<E>(s, call, 1), per_row = (saved_bytes<E>(s, call, 1 + 16) - one) / 16;
  return {one + 7 * per_row, per_row};
}

}  // namespace ISA
