// Threads: who does what, and how they wait for one another. The threads themselves are OpenMP's; see api.cc.
#pragma once
#include <sched.h>

#include "shape.h"

namespace ISA {

struct alignas(64) Barrier {
  int arrived, turn;

  void wait(long members) {
    if (members == 1) return;
    int mine = __atomic_load_n(&turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&turn, mine + 1, __ATOMIC_RELEASE);
      return;
    }
    // Spinning is for a thread that is about to arrive; where one lost its core, the core must be given up.
    for (int spins = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) == mine; ++spins) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
};

// One thread's part in the recurrence: rows [row, end_row) of directions [direction, end_direction), and of their units
// the share of `member`. Members of a group share rows and wait for one another at `barrier`.
struct Part {
  long direction, end_direction, row, end_row, groups, group, member, members;
  Barrier* barrier;
  bool is_idle;

  void wait() const { barrier->wait(members); }
  long first(long count) const { return count * member / members; }
  long end(long count) const { return count * (member + 1) / members; }
};

// Rows are cut so that each group has the same number of steps, as rows differ in length.
inline long row_cut(const Shape& s, const long* starts, long group, long groups) {
  if (group == groups) return s.B;
  long target = s.N * group / groups, steps = 0, row = 0, t = s.T - 1;
  for (; row < s.B && steps < target; ++row) {
    while (t >= 0 && starts[t + 1] - starts[t] <= row) --t;
    steps += t + 1;
  }
  return row;
}

inline Part part_of(const Shape& s, const long* starts, long worker, long workers, Barrier* barriers) {
  long teams = s.directions == 2 && workers % 2 == 0 ? 2 : 1, size = workers / teams;
  long groups = 1, most = s.row_groups(size);
  for (long g = 2; g <= most; ++g)
    if (g * min(size / g, s.units) >= groups * min(size / groups, s.units)) groups = g;
  Part p{};
  long team = worker / size, place = worker % size;
  p.groups = groups, p.members = min(size / groups, s.units);
  p.group = place / p.members, p.member = place % p.members;
  p.is_idle = p.group >= groups;
  p.direction = teams == 2 ? team : 0, p.end_direction = teams == 2 ? team + 1 : s.directions;
  if (p.is_idle) return p;
  p.row = row_cut(s, starts, p.group, groups), p.end_row = row_cut(s, starts, p.group + 1, groups);
  p.barrier = barriers + 1 + team * size + p.group;
  return p;
}

}  // namespace ISA
