// A hash of every bit of some memory. A change of any one word always changes it.
#pragma once
#include <stdint.h>
#include <string.h>

namespace ISA {

inline uint64_t digest(const void* memory, uint64_t bytes) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  constexpr int chains = 4, lanes = sizeof(Words) / 4;  // independent chains hide the latency of multiplying
  constexpr uint64_t stripe = chains * sizeof(Words), odd = 0x9e3779b97f4a7c15;
  Words mixed[chains] = {};
  auto mix = [&](const char* from) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int chain = 0; chain < chains; ++chain) {
      Words words;
      memcpy(&words, from + chain * sizeof words, sizeof words);
      mixed[chain] = (mixed[chain] ^ words) * (uint32_t)odd;  // invertible: no word is lost
      mixed[chain] ^= mixed[chain] >> 15;
    }
  };
  const char* at = (const char*)memory;
  for (; bytes >= stripe; bytes -= stripe, at += stripe) mix(at);
  char rest[stripe] = {};
  memcpy(rest, at, bytes);
  mix(rest);
  uint64_t total = 0;
  for (int chain = 0; chain < chains; ++chain)
    for (int lane = 0; lane < lanes; ++lane) {
      total = (total ^ mixed[chain][lane]) * odd;
      total ^= total >> 29;
    }
  return total;
}

}  // namespace ISA
