// Which processors this process may use, and on which NUMA node each lies. Only the affinity masks
// and the quota of the control group count, so a container's share is respected.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace ktt {

struct NumaNode {
  int id;
  // One processor of each core first, then the second hyperthreads.
  std::vector<int> cpus;
  int num_cores;
};

// Nodes with at least one processor that any thread of this process may use, by id. Never empty.
// The calling thread alone would not do: OpenMP binds it to one processor when asked to.
std::vector<NumaNode> allowed_nodes();

// How many processors' worth of time the control groups (version 1 or 2) of this process grant,
// rounded up; 0 when they set no limit.
size_t cpu_quota();

// The same from what a control group's files say: "<quota> <period>" in microseconds, where
// version 2 writes "max" and version 1 "-1" for no limit.
size_t parse_quota(const std::string& text);

// Lets the calling thread run on these processors only. An empty list changes nothing, and so does
// a refusal by the operating system: a thread that is not pinned is slower, not wrong.
void pin_to(const std::vector<int>& cpus);

}  // namespace ktt
