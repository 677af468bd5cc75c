#include "bus_errors.h"

#include <atomic>

#ifndef _WIN32
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#endif

namespace onnx_quarot {
namespace {

std::atomic<std::size_t> replaced_pages{0};

#ifndef _WIN32

bool watching = false;
struct sigaction owner;
std::size_t page_bytes = 0;

void replace_page(int, siginfo_t* info, void*) {
  const int error = errno;
  auto* const address = static_cast<char*>(info->si_addr);
  char* const page = address - reinterpret_cast<std::uintptr_t>(address) % page_bytes;
  const bool missing = info->si_code == BUS_ADRERR;
  if (missing && mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
    ++replaced_pages;
  } else {
    sigaction(SIGBUS, &owner, nullptr);  // on return the access is repeated
  }
  errno = error;
}

#endif

}  // namespace

void watch_bus_errors(bool on) {
#ifndef _WIN32
  if (on == watching) return;
  if (on) {
    replaced_pages = 0;
    page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = &replace_page;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, &owner);
  } else {
    sigaction(SIGBUS, &owner, nullptr);
  }
  watching = on;
#else
  static_cast<void>(on);
#endif
}

std::size_t bus_errors() { return replaced_pages; }

}  // namespace onnx_quarot
