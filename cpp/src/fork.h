// Whether this process was forked from the one that made something: threads do not follow a fork.
#pragma once

#include <cstdint>

namespace ktt {

// Differs between a process and those forked from it. No system call, unlike getpid().
uint32_t fork_generation();

}  // namespace ktt
