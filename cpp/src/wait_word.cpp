#include "wait_word.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

namespace ktt {
namespace {

// Long enough to bridge the gaps within a forward, short enough not to be felt by others.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kPausesBetweenLooks = 16;

}  // namespace

bool WaitWord::wait(uint32_t old) const {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesBetweenLooks; ++i) {
      if (load() != old) return false;
      pause_spinning();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  num_sleepers_.fetch_add(1);
  while (value_.load() == old) {
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  num_sleepers_.fetch_sub(1);
  return true;
}

void WaitWord::wake_sleepers(uint32_t count) {
  syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, static_cast<int>(count), nullptr, nullptr, 0);
}

}  // namespace ktt
