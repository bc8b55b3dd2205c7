// Threads: their work, and how they wait for one another. The threads themselves are OpenMP's; see api.cc.
#pragma once
#include <sched.h>
#include <time.h>

#include "shape.h"

namespace ISA {

// Asks the caller's `go_on` soon after the beginning, and then now and again. If the call is to end, all threads learn it at
// their barriers.
struct alignas(64) Watch {
  FestinaGoOn go_on;
  int ended;        // once it is 1, it stays so
  long done, next;  // multiplications since the last look at the clock; when to ask, in nanoseconds

  bool is_ended() const { return __atomic_load_n(&ended, __ATOMIC_ACQUIRE); }

  // For the calling thread, after that many multiplications.
  INLINE void look(long multiplications) {
    if (go_on && (done += multiplications) >= enough) ask();
  }

  static constexpr long enough = 1 << 21;           // a millisecond or so, beside which a look at the clock is nothing
  static constexpr long interval = 100 * 1000000L;  // `go_on` may have to wait for a lock

 private:
  static long now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
  }

  void ask() {
    done = 0;
    if (ended || now() < next) return;
    if (!go_on()) __atomic_store_n(&ended, 1, __ATOMIC_RELEASE);
    next = now() + interval;
  }
};

struct alignas(64) Barrier {
  const Watch* watch;
  int arrived, turn;
  bool ends;  // what the last member to arrive found

  // True, for all members alike, if the call is to end.
  bool wait(long members) {
    if (members == 1) return watch->is_ended();
    int mine = __atomic_load_n(&turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      bool found = ends = watch->is_ended();
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&turn, mine + 1, __ATOMIC_RELEASE);
      return found;
    }
    // Spinning suits a thread that is about to arrive; a thread that has lost its core needs one to be given up.
    for (int spins = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) == mine; ++spins) {
      if (spins > 256) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return ends;  // not yet that of the next turn, which waits for this member
  }
};

// One thread's part in the recurrence: rows [row, end_row) of directions [direction, end_direction). A team is the threads
// that share rows: each of its `members` has its own chunks of H and P, and they wait for one another at `barrier`.
struct Part {
  long direction, end_direction, row, end_row, teams, team, member, members;
  Barrier* barrier;
  Watch* watch;
  bool is_idle, is_caller;

  bool wait() const { return barrier->wait(members); }
  void look(long multiplications) const {
    if (is_caller) watch->look(multiplications);
  }

  // Calls body(n, count) for chunks of a product's columns, all at once unless that takes long: then for a multiple of
  // `period` at a time, until the call ends. The product is incomplete then.
  template <class Body> void in_pieces(long columns, long period, long multiplications_a_column, Body body) const {
    constexpr long most = 1 << 30;  // some hundredths of a second
    if (columns * multiplications_a_column <= most) return body(0, columns);
    long piece = max(1, most / (multiplications_a_column * period)) * period;
    for (long n = 0; n < columns && !watch->is_ended(); n += piece) {
      long count = min(piece, columns - n);
      body(n, count);
      look(count * multiplications_a_column);
    }
  }
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

inline Part part_of(const Shape& s, const long* starts, long worker, long workers, Barrier* barriers, Watch* watch) {
  long splits = s.directions == 2 && workers % 2 == 0 ? 2 : 1, size = workers / splits;  // each direction has its threads
  long teams = 1, most = s.teams(size);
  for (long n = 2; n <= most; ++n)
    if (n * min(size / n, s.H_chunks) >= teams * min(size / teams, s.H_chunks)) teams = n;
  Part p{};
  long split = worker / size, place = worker % size;
  p.teams = teams, p.members = min(size / teams, s.H_chunks);
  p.team = place / p.members, p.member = place % p.members;
  p.is_idle = p.team >= teams;
  p.watch = watch, p.is_caller = worker == 0;
  p.direction = splits == 2 ? split : 0, p.end_direction = splits == 2 ? split + 1 : s.directions;
  if (p.is_idle) return p;
  p.row = first_row(s, starts, p.team, teams), p.end_row = first_row(s, starts, p.team + 1, teams);
  p.barrier = barriers + 1 + split * size + p.team;
  return p;
}

}  // namespace ISA
