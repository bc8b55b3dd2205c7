// Threads: their work, and how they wait for one another. The threads themselves are OpenMP's; see api.cc.
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
    // Spinning suits a thread that is about to arrive; a thread that has lost its core needs one to be given up.
    for (int spins = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) == mine; ++spins) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
};

// One thread's part in the recurrence: rows [row, end_row) of directions [direction, end_direction). A team is the threads
// that share rows: each of its `members` has its own chunks of H and P, and they wait for one another at `barrier`.
struct Part {
  long direction, end_direction, row, end_row, teams, team, member, members;
  Barrier* barrier;
  bool is_idle;

  void wait() const { barrier->wait(members); }
  long first(long count) const { return count * member / members; }
  long end(long count) const { return count * (member + 1) / members; }
};

// The first row of a team. Each team has about the same number of packed steps, since rows differ in length.
inline long first_row(const Shape& s, const long* starts, long team, long teams) {
  if (team == teams) return s.B;
  long target = s.N * team / teams, steps = 0, row = 0, t = s.T - 1;
  for (; row < s.B && steps < target; ++row) {
    while (t >= 0 && starts[t + 1] - starts[t] <= row) --t;
    steps += t + 1;
  }
  return row;
}

inline Part part_of(const Shape& s, const long* starts, long worker, long workers, Barrier* barriers) {
  long splits = s.directions == 2 && workers % 2 == 0 ? 2 : 1, size = workers / splits;  // each direction has its threads
  long teams = 1, most = s.teams(size);
  for (long n = 2; n <= most; ++n)
    if (n * min(size / n, s.H_chunks) >= teams * min(size / teams, s.H_chunks)) teams = n;
  Part p{};
  long split = worker / size, place = worker % size;
  p.teams = teams, p.members = min(size / teams, s.H_chunks);
  p.team = place / p.members, p.member = place % p.members;
  p.is_idle = p.team >= teams;
  p.direction = splits == 2 ? split : 0, p.end_direction = splits == 2 ? split + 1 : s.directions;
  if (p.is_idle) return p;
  p.row = first_row(s, starts, p.team, teams), p.end_row = first_row(s, starts, p.team + 1, teams);
  p.barrier = barriers + 1 + split * size + p.team;
  return p;
}

}  // namespace ISA
