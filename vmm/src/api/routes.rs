//! The one table of resources: what the dispatcher serves is what the OpenAPI document describes.

use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::reply::{Reply, Status};
use super::request::Method;
use super::server::Api;
use super::{machine, own, plug, screen};
use crate::lifecycle::Subscription;

/// Where everything is.
pub(super) const ROOT: &str = "/api/v1";
/// The end of a path that stands for any rest.
const REST: &str = "/{path}";

/// A request, as far as the one who carries it out needs it.
pub(super) struct Asked<'a> {
    pub(super) body: &'a [u8],
    /// What came beside it; closed unless it is taken.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// What becomes of a request.
pub(super) enum Answer {
    /// This.
    Reply(Reply),
    /// This, and when it was sent, that.
    Last(Reply, fn(&Api)),
    /// Events until one of both ends closes the connection.
    Events(Subscription),
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

pub(super) type Served = Result<Answer, Reply>;
/// Carries a request out; the text is what the path has beyond the route's.
type Serve = fn(&Api, &str, &mut Asked<'_>) -> Served;
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What a resource answers when all is well.
#[derive(Clone, Copy)]
pub(super) enum Good {
    /// 204.
    Nothing,
    /// 200 and JSON.
    Json(SchemaOf),
    /// 200 and JSON, or 204 where there is nothing to say yet.
    Perhaps(SchemaOf),
    /// 200 and JSON lines without end.
    Lines(SchemaOf),
    /// 200 and Prometheus' text.
    Metrics,
    /// 200 and a PNG.
    Picture,
    /// Never: it is refused by name.
    Never,
}

/// One resource.
pub struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) about: &'static str,
    pub(super) body: Option<SchemaOf>,
    pub(super) good: Good,
    /// Statuses of refusals that a client can run into, besides 500.
    pub(super) refusals: &'static [Status],
    serve: Serve,
}

impl Route {
    /// How it is asked for.
    #[must_use]
    pub fn method(&self) -> Method {
        self.method
    }

    /// Where it is; `{path}` at its end stands for any rest.
    #[must_use]
    pub fn path(&self) -> &'static str {
        self.path
    }

    /// The rest of `path` when this is its resource.
    fn matches<'a>(&self, path: &'a str) -> Option<&'a str> {
        match self.path.strip_suffix(REST) {
            Some(front) => path.strip_prefix(front)?.strip_prefix('/'),
            None => (path == self.path).then_some(""),
        }
    }
}

/// The schema of `T`.
pub(super) fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// All resources.
pub fn routes() -> &'static [Route] {
    static ALL: LazyLock<Vec<Route>> = LazyLock::new(|| {
        let mut all = machine::routes();
        all.extend(plug::routes());
        all.extend(screen::routes());
        all.extend(own::routes());
        all
    });
    &ALL
}

/// A resource that is read.
pub(super) fn get(path: &'static str, about: &'static str, good: Good, serve: Serve) -> Route {
    Route { method: Method::Get, path, about, body: None, good, refusals: &[], serve }
}

/// A resource that does something.
pub(super) fn put(path: &'static str, about: &'static str, good: Good, serve: Serve) -> Route {
    Route { method: Method::Put, ..get(path, about, good, serve) }
}

impl Route {
    /// It needs a body.
    pub(super) fn takes<T: JsonSchema>(mut self) -> Self {
        self.body = Some(of::<T>);
        self
    }

    /// It may be refused with these, besides 500.
    pub(super) fn refuses(mut self, refusals: &'static [Status]) -> Self {
        self.refusals = refusals;
        self
    }
}

/// Finds the resource and has the request carried out.
pub(super) fn serve(api: &Api, method: Method, path: &str, asked: &mut Asked<'_>) -> Answer {
    let mut other = None;
    for route in routes() {
        let Some(rest) = route.matches(path) else { continue };
        if route.method == method {
            return (route.serve)(api, rest, asked).unwrap_or_else(Answer::Reply);
        }
        other = Some(route.method);
    }
    let reply = match other {
        Some(right) => {
            let why = format!("{path} is asked for with {}, not with {}", right.name(), method.name());
            Reply::refused(Status::BadRequest, &[why])
        }
        None => {
            let why = format!("there is no resource {path}; {ROOT}/openapi.json lists all of them");
            Reply::refused(Status::NotFound, &[why])
        }
    };
    reply.into()
}
