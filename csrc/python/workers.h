// Threads that share the rows of large calls.
#ifndef ONNX_QUAROT_PYTHON_WORKERS_H
#define ONNX_QUAROT_PYTHON_WORKERS_H

#include <cstddef>
#include <functional>

namespace onnx_quarot {

// part(0) to part(count - 1), each once: on this thread and on up to threads - 1 others, which are started by the first
// calls and kept for later ones. A thread that is free takes the next part, so one that wakes up late costs little.
// Returns when all parts have ended, and rethrows the first exception. Calls may come from several threads at once, and
// in a process that was forked.
void run_parts(std::size_t count, std::size_t threads, const std::function<void(std::size_t)>& part);

}  // namespace onnx_quarot

#endif
