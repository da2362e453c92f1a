# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The worker of a slotted model, and the metrics and log lines of its engine."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import relied_on, wrapped

_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_METRICS = "vllm.v1.metrics.prometheus"
_LOGGER = "vllm.v1.metrics.loggers:LoggingStatLogger"

WORKER = (
    *(
        wrapped(
            f"{worker}.compile_or_warm_up_model",
            "undoes what warm-up batches loaded and counted",
            in_tree="one call at the end of this method",
            deferred=True,
        )
        for worker in (_WORKER, "vllm.v1.worker.cpu_worker:CPUWorker")
    ),
    wrapped(
        f"{_WORKER}.shutdown",
        "writes the residents for the next start, if warm_start names a directory, and "
        "closes the trace; executors call it when a worker ends, also after SIGTERM",
        in_tree="one call at the beginning of this method",
        deferred=True,
    ),
    *(
        wrapped(
            f"{_WORKER}.{name}",
            "is refused for a slotted model, before anything has changed",
            in_tree="a check at the beginning of this method",
            deferred=True,
        )
        for name in (
            "reload_weights",
            "reset_weights",
            "compute_weight_checksums",
            "save_tensorized_model",
        )
    ),
    relied_on(
        f"{_METRICS}:get_prometheus_registry",
        "is prometheus_client's global registry, unless there are several API servers",
        in_tree="the samples are made in PrometheusStatLogger",
    ),
    wrapped(
        "prometheus_client.multiprocess:MultiProcessCollector.collect",
        "adds the counters to what several API servers answer to a scrape",
        in_tree="nothing: a metric of PrometheusStatLogger is in the servers' files",
        deferred=True,
    ),
    wrapped(
        f"{_LOGGER}.log",
        "adds a line about the slots after vLLM's own",
        in_tree="one call at the end of this method, as for speculative decoding",
        deferred=True,
    ),
    relied_on(
        f"{_LOGGER}.last_log_time",
        "is the begin of the interval that the next line is about",
        deferred=True,
    ),
    relied_on(
        f"{_LOGGER}.engine_is_idle",
        "is true where vLLM's own line is at debug level",
        deferred=True,
    ),
    relied_on(
        f"{_LOGGER}.vllm_config", "tells which engine a line is about", deferred=True
    ),
    relied_on(
        "vllm.config.vllm:VllmConfig.instance_id",
        "is not the same for two engines of a process (a field)",
    ),
    relied_on(
        f"{_METRICS}:unregister_vllm_metrics",
        "removes vLLM's own metrics by `_name`, which a collector does not have",
    ),
    relied_on(
        "vllm.v1.core.kv_cache_utils:get_kv_cache_capacity",
        "gives the tokens that the KV cache holds, for the header of a trace",
    ),
    relied_on(
        "vllm.envs:VLLM_RAY_EXTRA_ENV_VARS_TO_COPY",
        "tells workers on Ray where the counters lie",
    ),
    relied_on(
        "vllm.envs:VLLM_USE_RUST_FRONTEND",
        "tells that /metrics is answered without Python",
    ),
    relied_on(
        "vllm.ray.ray_env:get_env_vars_to_copy",
        "reads that list where a process is started on Ray",
    ),
    relied_on(
        "vllm.config.parallel:ParallelConfig.data_parallel_backend",
        "tells, with distributed_executor_backend, whether processes start on Ray",
    ),
    relied_on(
        "vllm.config.parallel:ParallelConfig.node_rank",
        "tells, with nnodes, that some counters are on other nodes (fields)",
    ),
)
