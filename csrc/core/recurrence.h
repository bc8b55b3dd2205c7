// What forward and backward share: the order of steps, and the buffers.
#pragma once
#include "gemm.h"
#include "norm.h"
#include "pack.h"
#include "pointwise.h"

namespace ISA {

// Steps in the order of a direction, for the rows of one part.
struct Order {
  const Shape& s;
  const long* starts;
  long d, row, end_row;

  long t(long step) const { return d == 0 ? step : s.T - 1 - step; }
  // The part's active rows at a step; none before the first step and after the last.
  long rows(long step) const {
    if (step < 0 || step >= s.T) return 0;
    return min(max(starts[t(step) + 1] - starts[t(step)] - row, 0), end_row - row);
  }
  long token(long step) const { return starts[t(step)] + row; }
};

// A thread's own numbers.
template <class T> struct Scratch {
  Sums<T> sums;
  long *left_at, *target_at, *chunk_at;  // offsets of rows: of a list of steps, and of successive rows in a blocked matrix
  T *scale[2], *pull[2];                 // [rows, max_gates]
  T *mean_c, *scale_c, *mean_d_seen, *mean_d_seen_hat, *rows;
  Blocked<Two> pairs;  // of h, for the product of a step
};

// The rows that a group of threads went back over in one stretch: slots [slot, slot + rows), and how many steps are left.
struct Stretch {
  long slot, rows, steps_left;
};

// Tasks that threads take one after the other.
struct alignas(64) Tasks {
  long next;

  template <class Task> void share(Task task) {
    while (task(__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))) {
    }
  }
};
constexpr int task_lists = 7;  // three passes over a stretch, for even and odd stretches, and the last pass

// What all threads share.
struct Common {
  long* starts;
  Barrier* barriers;
  Tasks* tasks;
  Stretch* stretches;  // [directions, threads]: of each group
};

inline Common take_common(Arena& arena, const Shape& s) {
  Common c;
  c.starts = arena.take<long>(s.T + 1);
  c.barriers = arena.take<Barrier>(1 + 2 * s.threads);
  c.tasks = arena.take<Tasks>(task_lists);
  c.stretches = arena.take<Stretch>(s.directions * s.threads);
  return c;
}

template <class T> T* take_published(Arena& arena, const Shape& s) {
  return arena.take<T>(s.threads * max_sums * s.list_rows());
}

template <class T> Scratch<T> take_scratch(Arena& arena, const Shape& s, T* published, long worker, const FestinaCall& call) {
  Scratch<T> my;
  long rows = s.list_rows();
  my.sums = {arena.take<T>(max_sums * rows * lanes<T>), published, rows, worker};
  my.left_at = arena.take<long>(rows), my.target_at = arena.take<long>(rows);
  my.chunk_at = arena.take<long>(rows);
  for (int side = 0; side < 2; ++side)
    my.scale[side] = arena.take<T>(rows * max_gates), my.pull[side] = arena.take<T>(rows * max_gates);
  my.mean_c = arena.take<T>(rows), my.scale_c = arena.take<T>(rows);
  my.mean_d_seen = arena.take<T>(rows), my.mean_d_seen_hat = arena.take<T>(rows);
  bool is_forward = call.pass != FESTINA_BACKWARD;
  my.rows = is_forward && call.type == FESTINA_BFLOAT16 ? arena.take<T>(rows * s.I) : nullptr;
  my.pairs = is_forward && s.is_paired ? arena.take_blocked<Two>(ceil_div(s.width, 2), s.B) : Blocked<Two>{};
  return my;
}

template <class T> Blocked<T> from_row(Blocked<T> m, long row) {
  return {m.data ? m.data + row * chunk<T> : nullptr, m.rows};
}

// Where a saved sum of a step lies.
template <class T> T* saved_sum(const Shape& s, const Saved<T>& saved, int sum, long token) {
  return saved.sums + sum * padded_rows(s.N) + token;
}

inline int sums_before(const Shape& s, int side) { return side && s.traits.is_normed[0] ? s.groups : 0; }
inline int sums_before_c(const Shape& s) { return s.groups * (s.traits.is_normed[0] + s.traits.is_normed[1]); }

// Zoneout: where the mask is true, or by the expectation at `rate`, the old value stays.
template <class T> struct Zoneout {
  bool is_active;
  const uint8_t* mask;  // of the direction: [N, columns]
  T rate;
  long columns;

  // The share of the old value that stays, of column k.
  T kept(long token, long k) const { return mask ? T(k < columns && mask[token * columns + k]) : rate; }

  void apply(long token, long first, long end, Blocked<T> old, Blocked<T> now, long row) const {
    for (long n = first; n < end; ++n)
      for (long l = 0; l < chunk<T>; ++l) {
        T was = old.at(n, row)[l], &is = now.at(n, row)[l];
        if (!mask)
          is = rate * was + (1 - rate) * is;
        else if (kept(token, n * chunk<T> + l) != 0)
          is = was;
      }
  }

  // Cuts the gradient of the mixture into that of the new value and, in place, that of the old one.
  void backward(long token, long first, long end, Blocked<T> d, Blocked<T> d_new, long new_row, long row) const {
    if (!is_active) {
      copy_row(d, row, d_new, new_row, first, end);
      return clear_row(d, first, end, row);
    }
    for (long n = first; n < end; ++n)
      for (long l = 0; l < chunk<T>; ++l) {
        T keep = kept(token, n * chunk<T> + l), &whole = d.at(n, row)[l];
        d_new.at(n, new_row)[l] = (1 - keep) * whole;
        whole *= keep;
      }
  }
};

template <class T> Zoneout<T> zoneout_h(const Shape& s, const FestinaCall& call, long d) {
  const uint8_t* mask = call.zoneout_mask;
  return {call.has_zoneout != 0, mask ? mask + d * s.N * s.P : nullptr, (T)call.zoneout, s.P};
}

template <class T> Zoneout<T> zoneout_c(const Shape& s, const FestinaCall& call, long d) {
  const uint8_t* mask = call.zoneout_cell_mask;
  return {call.has_zoneout_cell != 0, mask ? mask + d * s.N * s.H : nullptr, (T)call.zoneout_cell, s.H};
}

}  // namespace ISA
