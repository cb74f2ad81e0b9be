//! What there is to see: where viewers connect, pictures and recordings of a head, another size for one.

use std::os::fd::OwnedFd;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::body;
use super::machine::{done, said};
use super::reply::{Reply, Status};
use super::routes::{Asked, Good, Route, Served, get, of, put};
use super::server::Api;
use crate::screen::WhereToLook;

/// A head.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct OfHead {
    /// Which; the first is 0.
    #[serde(default)]
    head: u32,
}

/// What a recording came to.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
struct Recorded {
    /// Pictures in it.
    frames: u32,
}

/// Another size.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NewMode {
    /// Of which head; the first is 0.
    #[serde(default)]
    head: u32,
    /// Columns.
    width: u32,
    /// Rows.
    height: u32,
}

/// The resources of this file.
pub(super) fn routes() -> Vec<Route> {
    const GONE: &[Status] = &[Status::NotFound];
    const MISTAKES: &[Status] = &[Status::BadRequest, Status::NotFound];
    vec![
        get("/api/v1/vm.display", "Where people look at the machine.", Good::Json(of::<WhereToLook>), |api, _, _| {
            said(api.control.where_to_look())
        })
        .refuses(GONE),
        get("/api/v1/vm.screenshot/{path}", "What a head shows, by its number.", Good::Picture, screenshot)
            .refuses(MISTAKES),
        put(
            "/api/v1/vm.resize-display",
            "Gives a head another size; the guest is told.",
            Good::Nothing,
            |api, _, asked| {
                let NewMode { head, width, height } = body::decode(asked.body)?;
                done(api.control.resize_display(head, width, height))
            },
        )
        .takes::<NewMode>()
        .refuses(MISTAKES),
        put(
            "/api/v1/vm.record",
            "Records a head to the file whose descriptor comes beside the request (animated PNG).",
            Good::Nothing,
            record,
        )
        .takes::<OfHead>()
        .refuses(MISTAKES),
        put("/api/v1/vm.stop-record", "Ends a recording.", Good::Json(of::<Recorded>), |api, _, asked| {
            let OfHead { head } = body::decode(asked.body)?;
            said(api.control.stop_record(head).map(|frames| Recorded { frames }))
        })
        .takes::<OfHead>()
        .refuses(MISTAKES),
    ]
}

fn screenshot(api: &Api, head: &str, _: &mut Asked<'_>) -> Served {
    let Ok(head) = head.parse() else {
        let why = format!("'{head}' is no number of a head: vm.screenshot/0 is the first");
        return Err(Reply::refused(Status::BadRequest, &[why]));
    };
    Ok(Reply::picture(api.control.screenshot(head)?).into())
}

fn record(api: &Api, _: &str, asked: &mut Asked<'_>) -> Served {
    let OfHead { head } = body::decode(asked.body)?;
    let mut descriptors: Vec<OwnedFd> = std::mem::take(&mut asked.descriptors);
    let (Some(file), true) = (descriptors.pop(), descriptors.is_empty()) else {
        let why =
            "the file's descriptor comes beside the request, with its first bytes (SCM_RIGHTS), and no other".into();
        return Err(Reply::refused(Status::BadRequest, &[why]));
    };
    done(api.control.record(head, file))
}
