// Reads of mapped files that another process cuts off, or that the disk fails to give. The system answers them with
// SIGBUS, which ends the process. While they are watched, the missing page becomes zeros, and is counted: whoever reads
// asks afterwards, and throws away what was made of it. For processes that are ours alone: the signal is the process's.
#pragma once

#include <cstddef>

namespace onnx_quarot {

// Starts watching and counts from zero, or gives the signal back to whom it belonged. Nothing on Windows, where a
// mapped file cannot be cut off.
void watch_bus_errors(bool on);

// Pages replaced since watching began.
std::size_t bus_errors();

}  // namespace onnx_quarot
