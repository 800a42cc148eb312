//! Logs and traces of the process.
//!
//! Logs go to standard error: for people on a terminal, otherwise one JSON object a line. Traces go to an OTLP collector when
//! an endpoint is configured, and only the spans of our own crates: the layer unfiltered made 164 spans of one call.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// Crates whose spans are exported.
const OUR_CRATES: [&str; 4] = ["martlet", "martlet_gateway", "martlet_node", "martlet_loadtest"];

/// Logs and traces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TelemetryConfig {
    /// What is logged: a level, or directives as of `tracing_subscriber::EnvFilter` (`info,martlet_node=debug`).
    pub(crate) log: String,
    /// `auto` (for people on a terminal, else JSON), `human` or `json`.
    pub(crate) log_format: LogFormat,
    /// gRPC endpoint of an OTLP collector, `http://host:4317`; empty: no traces.
    pub(crate) otlp_endpoint: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        // openraft tells every election as prose, ordinary ones as warnings; what stops a group is logged by us.
        Self { log: "info,openraft=error".to_owned(), log_format: LogFormat::Auto, otlp_endpoint: String::new() }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Auto,
    Human,
    Json,
}

/// Keeps the exporter of traces; spans that wait are sent by [`Telemetry::flush`].
#[derive(Debug)]
pub(crate) struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Sends what waits and ends the exporter.
    pub(crate) fn flush(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "some spans were not exported");
        }
    }
}

/// Installs logs and traces for the process; to be called once, within the runtime.
///
/// # Errors
/// When a directive or the endpoint does not parse.
pub(crate) fn install(config: &TelemetryConfig, role: &'static str) -> Result<Telemetry> {
    let filter = EnvFilter::try_new(&config.log)
        .with_context(|| format!("telemetry.log: {:?} is not a level or a list of directives", config.log))?;
    let for_people = match config.log_format {
        LogFormat::Human => true,
        LogFormat::Json => false,
        LogFormat::Auto => std::io::stderr().is_terminal(),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if for_people {
        lines.with_ansi(std::io::stderr().is_terminal()).boxed()
    } else {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    };
    let provider = if config.otlp_endpoint.is_empty() { None } else { Some(exporter(config, role)?) };
    let spans = provider.as_ref().map(|provider| {
        let ours = Targets::new().with_targets(OUR_CRATES.map(|name| (name, LevelFilter::INFO)));
        tracing_opentelemetry::layer().with_tracer(provider.tracer("martlet")).with_filter(ours)
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans)
        .try_init()
        .context("install the log subscriber")?;
    Ok(Telemetry(provider))
}

fn exporter(config: &TelemetryConfig, role: &'static str) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&config.otlp_endpoint)
        .build()
        .with_context(|| format!("telemetry.otlp_endpoint: {:?}", config.otlp_endpoint))?;
    let resource = Resource::builder().with_service_name(format!("martlet-{role}")).build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}
