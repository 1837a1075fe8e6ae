/* What torch's CUDA build asks before it runs anything: one GPU, its properties, streams and events.
 *
 * Preloaded, these replace the same functions of the CUDA runtime. There is no memory and there are no kernels: the
 * tensors of bench/plan/standin.py have only a shape, so a function that is missing here is one that must not be called.
 * Under its soname, libcuda.so.1, this is the driver too, of which torch asks only whether the device is in use.
 */
#include <cuda_runtime_api.h>
#include <string.h>

static void *handle(void) {
    static size_t handles = 0;
    return (void *)(64 * ++handles);
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) { /* of an H100 or H200 */
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "stand-in (sm_90)");
    properties->major = 9;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 227 << 10;
    properties->totalGlobalMem = (size_t)80 << 30;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) { *value = 0; return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = *high = 0; return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = handle();
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

/* libcaffe2_nvrtc.so takes the addresses of these when it is loaded; nothing calls them. */
#define UNUSED(name) int name(void) { return 999; }
UNUSED(cuCtxGetCurrent) UNUSED(cuCtxSetCurrent) UNUSED(cuDeviceGet) UNUSED(cuDeviceGetAttribute)
UNUSED(cuDevicePrimaryCtxRetain) UNUSED(cuFuncGetAttribute) UNUSED(cuFuncSetAttribute) UNUSED(cuFuncSetCacheConfig)
UNUSED(cuGetErrorString) UNUSED(cuLaunchCooperativeKernel) UNUSED(cuLaunchKernel) UNUSED(cuLinkAddData_v2)
UNUSED(cuLinkComplete) UNUSED(cuLinkCreate_v2) UNUSED(cuModuleGetFunction) UNUSED(cuModuleLoad) UNUSED(cuModuleLoadData)
UNUSED(cuModuleLoadDataEx) UNUSED(cuModuleUnload) UNUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNUSED(cuPointerGetAttribute) UNUSED(cuTensorMapEncodeTiled)
