//! The OpenAPI 3.1 document, made of the table of resources and of the types that are decoded and encoded, so that it
//! cannot say anything else than what is served.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::reply::{Content, Status};
use super::request::Method;
use super::routes::{Good, Route, of, routes};

/// The document.
#[must_use]
pub fn document() -> Value {
    // OpenAPI 3.1 takes JSON Schema 2020-12 as it is; only the place of the definitions is its own.
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut requests = settings.clone().for_deserialize().into_generator();
    let mut paths = Map::new();
    for route in routes() {
        let operation = operation(route, &mut requests);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        if let Some(path) = path.as_object_mut() {
            path.insert(route.method.name().to_ascii_lowercase(), operation);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Atoll",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "One virtual machine, over a UNIX socket. Paths, bodies and statuses are Cloud Hypervisor's \
                            wherever it has the resource. Refusals are arrays of sentences.",
            "license": { "name": "Apache-2.0 OR BSD-3-Clause", "identifier": "Apache-2.0 OR BSD-3-Clause" },
        },
        "servers": [{ "url": "http://localhost", "description": "the socket of --api-socket" }],
        "paths": paths,
        "components": { "responses": everywhere(&mut requests), "schemas": requests.take_definitions(true) },
    })
}

/// Statuses that each resource can answer with, whatever is asked of it: the request cannot be read, or comes to the wrong
/// method; all connections are busy.
const EVERYWHERE: [(Status, &str, &str); 2] = [
    (
        Status::BadRequest,
        "Unreadable",
        "the request is not HTTP/1.1, too long, not whole in time, or of the wrong method",
    ),
    (Status::TooMany, "Crowded", "every connection that there may be has a request under way"),
];

/// The responses of [`EVERYWHERE`], by name.
fn everywhere(generator: &mut SchemaGenerator) -> Value {
    let mut responses = Map::new();
    for (_, name, about) in EVERYWHERE {
        let sentences: Value = of::<Vec<String>>(generator).into();
        let content = json!({ Content::Json.media_type(): { "schema": sentences } });
        responses.insert(name.into(), json!({ "description": about, "content": content }));
    }
    responses.into()
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut responses = Map::new();
    let body = |schema: Value, media: &str| json!({ media: { "schema": schema } });
    let json = Content::Json.media_type();
    let mut good = |status: Status, about: &str, content: Option<Value>| {
        let mut response = json!({ "description": about });
        if let (Some(response), Some(content)) = (response.as_object_mut(), content) {
            response.insert("content".into(), content);
        }
        responses.insert(status.code().to_string(), response);
    };
    match route.good {
        Good::Nothing => good(Status::NoContent, "done", None),
        Good::Json(schema) => good(Status::Ok, "found", Some(body(schema(generator).into(), json))),
        Good::Perhaps(schema) => {
            good(Status::Ok, "done, and this is where", Some(body(schema(generator).into(), json)));
            good(Status::NoContent, "kept until the machine boots", None);
        }
        Good::Lines(schema) => {
            good(Status::Ok, "one object a line", Some(body(schema(generator).into(), "application/x-ndjson")));
        }
        Good::Metrics => {
            let media = Content::Metrics.media_type();
            good(Status::Ok, "Prometheus' text format", Some(body(json!({ "type": "string" }), media)));
        }
        Good::Picture => {
            let media = Content::Picture.media_type();
            good(Status::Ok, "a PNG", Some(body(json!({ "type": "string", "format": "binary" }), media)));
        }
        Good::Never => {}
    }
    let always: &[Status] = if matches!(route.good, Good::Never) { &[Status::BadRequest] } else { &[Status::Failed] };
    for status in route.refusals.iter().chain(always) {
        let sentences: Value = of::<Vec<String>>(generator).into();
        good(*status, refusal(*status), Some(body(sentences, json)));
    }
    for (status, name, _) in EVERYWHERE {
        let response = responses.entry(status.code().to_string());
        response.or_insert_with(|| json!({ "$ref": format!("#/components/responses/{name}") }));
    }
    let mut operation = json!({
        "summary": route.about,
        "operationId": operation_id(route),
        "responses": responses,
    });
    if let Some(operation) = operation.as_object_mut() {
        if let Some(schema) = route.body {
            let schema: Value = schema(generator).into();
            operation.insert("requestBody".into(), json!({ "required": true, "content": body(schema, json) }));
        }
        if route.path.ends_with("/{path}") {
            let parameter = json!({
                "name": "path", "in": "path", "required": true, "schema": { "type": "string" },
                "description": "names from the top, with slashes between them: devices/_disk0",
            });
            operation.insert("parameters".into(), json!([parameter]));
        }
    }
    operation
}

fn operation_id(route: &Route) -> String {
    let verb = if route.method == Method::Get { "get" } else { "put" };
    let words = route.path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.fold(verb.to_owned(), |id, word| id + "_" + word)
}

fn refusal(status: Status) -> &'static str {
    match status {
        Status::BadRequest => "it cannot be carried out: the body, the configuration or what is asked for is at fault",
        Status::NotFound => "there is no machine, or no device or resource of that name",
        Status::Conflict => "there is one of that name",
        Status::TooMany => "too much at once",
        _ => "it went wrong, or does not fit the state of the machine",
    }
}
