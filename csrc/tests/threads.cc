// OpenMP's three functions on threads of their own, for ThreadSanitizer: it cannot see how libgomp's threads wait for one
// another, and would report every result that one of them hands to the next.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, count = 1;
}

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  auto run = [=](int i) {
    number = i, count = (int)threads;
    body(data);
    number = 0, count = 1;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, (int)i);
  run(0);
  for (std::thread& other : others) other.join();
}

int omp_get_thread_num(void) { return number; }
int omp_get_num_threads(void) { return count; }
}
