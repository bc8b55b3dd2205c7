// What forward and backward share: the order of steps, and the buffers.
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "norm.h"
#include "panels.h"

namespace ISA {

// The steps t = 0, 1 ... of a direction, for the rows of one part.
struct Order {
  const Shape& s;
  const long* starts;
  long d, row, end_row;

  long time(long t) const { return d == 0 ? t : s.T - 1 - t; }
  // The part's active rows; 0 before the first step and after the last.
  long rows(long t) const {
    if (t < 0 || t >= s.T) return 0;
    return min(max(starts[time(t) + 1] - starts[time(t)] - row, 0), end_row - row);
  }
  long token(long t) const { return starts[time(t)] + row; }
  bool is_reset(const FestinaCall& call, long t, long r) const { return call.resets && call.resets[d * s.N + token(t) + r]; }
};

// Working memory of one thread.
template <class E> struct Scratch {
  Sums<E> sums;
  long *left_at, *target_at, *chunk_at;  // offsets of rows: of a segment's, and of successive rows in a blocked matrix
  E *scale[2], *correction[2];           // [rows, max_gates]
  E *mean_c, *scale_c, *d_c_hat_mean, *d_c_hat_dot, *rows;
  Blocked<Two> pairs;  // h as the recurrent product takes it
};

// What a team's backward pass over one segment (a run of successive steps) has left: gradients of `rows` packed steps in rows
// [slot, slot + rows) of the segment's buffers, and the number of steps before it.
struct Segment {
  long slot, rows, steps_left;
};

// Tasks that threads take one after the other.
struct alignas(64) Tasks {
  long next;

  // Until none is left, or the call ends.
  template <class Task> void share(const Part& part, Task task) {
    while (!part.watch->is_ended() && task(__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))) part.look(Watch::enough);
  }
};
constexpr int task_lists = 7;  // three passes over a segment, for even and odd segments, and the last pass

// What all threads share.
struct Common {
  Watch* watch;
  long* starts;
  Barrier* barriers;
  Tasks* tasks;
  Segment* segments;  // [directions, threads]: of each team
};

inline Common take_common(Arena& arena, const Shape& s) {
  Common c;
  c.watch = arena.take<Watch>(1);
  c.starts = arena.take<long>(s.T + 1);
  c.barriers = arena.take<Barrier>(1 + 2 * s.threads);
  c.tasks = arena.take<Tasks>(task_lists);
  c.segments = arena.take<Segment>(s.directions * s.threads);
  return c;
}

template <class E> E* take_published(Arena& arena, const Shape& s) {
  return arena.take<E>(s.threads * max_sums * s.scratch_rows());
}

template <class E> Scratch<E> take_scratch(Arena& arena, const Shape& s, E* published, long worker, const FestinaCall& call) {
  Scratch<E> my;
  long rows = s.scratch_rows();
  my.sums = {arena.take<E>(max_sums * rows * lanes<E>), published, rows, worker};
  my.left_at = arena.take<long>(rows), my.target_at = arena.take<long>(rows);
  my.chunk_at = arena.take<long>(rows);
  for (int side = 0; side < 2; ++side)
    my.scale[side] = arena.take<E>(rows * max_gates), my.correction[side] = arena.take<E>(rows * max_gates);
  my.mean_c = arena.take<E>(rows), my.scale_c = arena.take<E>(rows);
  my.d_c_hat_mean = arena.take<E>(rows), my.d_c_hat_dot = arena.take<E>(rows);
  bool is_forward = call.pass != FESTINA_BACKWARD;
  my.rows = is_forward && is_narrow(call.type) ? arena.take<E>(rows * s.I) : nullptr;
  my.pairs = is_forward && s.is_paired ? arena.take_blocked<Two>(ceil_div(s.P_chunks, 2), s.B) : Blocked<Two>{};
  return my;
}

template <class E> Blocked<E> from_row(Blocked<E> m, long row) { return {m.data ? m.data + row * chunk<E> : nullptr, m.rows}; }

// The address of one saved sum of a packed step.
template <class E> E* saved_sum(const Shape& s, const Saved<E>& saved, int sum, long token) {
  return saved.sums + sum * padded_rows(s.N) + token;
}

inline int sums_before(const Shape& s, int side) { return side && s.traits.is_normed[0] ? s.groups : 0; }
inline int sums_before_c(const Shape& s) { return s.groups * (s.traits.is_normed[0] + s.traits.is_normed[1]); }

// Zoneout: the old value stays where the mask is true; without a mask, old and new are mixed by `rate`.
template <class E> struct Zoneout {
  bool is_active;
  const uint8_t* mask;  // [N, columns]
  E rate;
  long columns;

  // The weight of the old value in column k.
  E kept(long token, long k) const { return mask ? E(k < columns && mask[token * columns + k]) : rate; }

  void apply(long token, long first, long end, Blocked<E> old, Blocked<E> now, long row) const {
    for (long n = first; n < end; ++n)
      for (long l = 0; l < chunk<E>; ++l) {
        E was = old.at(n, row)[l], &is = now.at(n, row)[l];
        if (!mask)
          is = rate * was + (1 - rate) * is;
        else if (kept(token, n * chunk<E> + l) != 0)
          is = was;
      }
  }

  // Splits the gradient of the mixture, d, into that of the new value, d_new, and in place that of the old one.
  void backward(long token, long first, long end, Blocked<E> d, Blocked<E> d_new, long new_row, long row) const {
    if (!is_active) {
      copy_row(d, row, d_new, new_row, first, end);
      return clear_row(d, first, end, row);
    }
    for (long n = first; n < end; ++n)
      for (long l = 0; l < chunk<E>; ++l) {
        E keep = kept(token, n * chunk<E> + l), &whole = d.at(n, row)[l];
        d_new.at(n, new_row)[l] = (1 - keep) * whole;
        whole *= keep;
      }
  }
};

template <class E> Zoneout<E> zoneout_h(const Shape& s, const FestinaCall& call, long d) {
  const uint8_t* mask = call.zoneout_mask;
  return {call.has_zoneout != 0, mask ? mask + d * s.N * s.P : nullptr, (E)call.zoneout, s.P};
}

template <class E> Zoneout<E> zoneout_c(const Shape& s, const FestinaCall& call, long d) {
  const uint8_t* mask = call.zoneout_cell_mask;
  return {call.has_zoneout_cell != 0, mask ? mask + d * s.N * s.H : nullptr, (E)call.zoneout_cell, s.H};
}

}  // namespace ISA
