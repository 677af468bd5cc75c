// Errors across the C boundary: statuses are checked as exceptions inside, and exceptions leave as statuses. No
// exception crosses into ONNX Runtime, and no status is dropped without being released.
#ifndef ONNX_QUAROT_ORT_STATUS_H
#define ONNX_QUAROT_ORT_STATUS_H

#include <exception>
#include <stdexcept>
#include <utility>

#include "abi.h"

namespace onnx_quarot::ort {

// A failure reported by ONNX Runtime, on its way back to it.
class StatusError : public std::exception {
 public:
  StatusError(const Api* api, Status* status) : api_(api), status_(status) {}
  StatusError(StatusError&& other) noexcept : api_(other.api_), status_(std::exchange(other.status_, nullptr)) {}
  StatusError(const StatusError&) = delete;
  StatusError& operator=(const StatusError&) = delete;
  StatusError& operator=(StatusError&&) = delete;
  ~StatusError() override {
    if (status_ != nullptr) ReleaseStatus(api_, status_);
  }

  Status* release() { return std::exchange(status_, nullptr); }
  const char* what() const noexcept override { return "ONNX Runtime returned a failure status"; }

 private:
  const Api* api_;
  Status* status_;
};

// Throws if `status` is a failure.
inline void check(const Api* api, Status* status) {
  if (status != nullptr) throw StatusError(api, status);
}

// Whether a call succeeded whose failure is an answer, not an error.
inline bool succeeded(const Api* api, Status* status) {
  if (status == nullptr) return true;
  ReleaseStatus(api, status);
  return false;
}

// Runs `body` and returns null, or what it threw as a status that the caller (ONNX Runtime) owns.
template <class Body>
Status* guarded(const Api* api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (StatusError& error) {
    return error.release();
  } catch (const std::invalid_argument& error) {
    return CreateStatus(api, kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return CreateStatus(api, kFail, error.what());
  } catch (...) {
    return CreateStatus(api, kFail, "onnx_quarot: unknown error");
  }
}

}  // namespace onnx_quarot::ort

#endif
