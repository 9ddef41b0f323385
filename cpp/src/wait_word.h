// A number that threads wait on: they spin for a moment, then sleep. Changing it costs a system
// call only when somebody sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace ktt {

// Tells the processor that this thread spins.
inline void pause_spinning() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class WaitWord {
 public:
  static constexpr uint32_t kAll = 1u << 30;  // as many as there are

  uint32_t load() const { return value_.load(std::memory_order_acquire); }
  void store(uint32_t value) { value_.store(value, std::memory_order_release); }  // wakes nobody
  uint32_t add(uint32_t count) { return value_.fetch_add(count) + count; }
  uint32_t subtract(uint32_t count) { return value_.fetch_sub(count) - count; }

  // Wakes up to `count` of those that sleep.
  void wake(uint32_t count) {
    if (num_sleepers_.load() > 0) wake_sleepers(count);
  }

  // Returns once the value differs from `old`; tells whether it slept for that.
  bool wait(uint32_t old) const;

 private:
  void wake_sleepers(uint32_t count);

  // Sequentially consistent where a change meets a sleeper: either the one who changes the value
  // sees the sleeper, or the sleeper sees the change.
  std::atomic<uint32_t> value_{0};
  mutable std::atomic<uint32_t> num_sleepers_{0};
};

}  // namespace ktt
