//! What Atoll has and Cloud Hypervisor has not: the state of each device, the live tree, events, metrics, and a description
//! of all this.

use std::sync::LazyLock;

use serde_json::Value;

use super::machine::said;
use super::openapi;
use super::reply::{Reply, Status};
use super::routes::{Answer, Asked, Good, Route, Served, get, of};
use super::server::Api;
use crate::lifecycle::{DeviceReport, StoryEvent};

/// The resources of this file.
pub(super) fn routes() -> Vec<Route> {
    use Good::{Json, Lines, Metrics};
    const GONE: &[Status] = &[Status::NotFound];
    vec![
        get("/api/v1/devices", "Every device with the state of its process.", Json(of::<Vec<DeviceReport>>), devices)
            .refuses(GONE),
        get("/api/v1/inspect", "The live tree: actors, devices, queues, vCPUs.", Json(of::<Value>), inspect)
            .refuses(GONE),
        get("/api/v1/inspect/{path}", "A part of the live tree.", Json(of::<Value>), inspect).refuses(GONE),
        get("/api/v1/events", "What happens from now on, a JSON object a line.", Lines(of::<StoryEvent>), events)
            .refuses(&[Status::TooMany]),
        get("/api/v1/metrics", "Counters and latency histograms.", Metrics, metrics),
        get("/metrics", "The same as /api/v1/metrics.", Metrics, metrics),
        get("/api/v1/openapi.json", "This description.", Json(of::<Value>), description),
    ]
}

fn devices(api: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    said(api.control.devices())
}

fn inspect(api: &Api, path: &str, _: &mut Asked<'_>) -> Served {
    said(api.control.inspect(path.trim_matches('/')))
}

fn events(api: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    Ok(Answer::Events(api.story.subscribe()))
}

fn metrics(api: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    Ok(Reply::metrics((api.metrics)()).into())
}

fn description(_: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(openapi::document);
    Ok(Reply::json(&*DOCUMENT).into())
}
