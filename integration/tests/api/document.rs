//! The OpenAPI document: somebody else's reader takes it, every reference leads somewhere, it names what is served and
//! nothing else, and its schemas say what the types say.

use std::collections::BTreeSet;

use atoll_vmm::api::{openapi_document, routes};
use serde_json::{Value, json};

#[test]
fn somebody_else_reads_it() {
    let spec = oas3::from_json(openapi_document().to_string()).expect("an OpenAPI 3.1 document");
    assert!(spec.openapi.starts_with("3.1"));
    let paths = spec.paths.as_ref().expect("paths");
    let mut operations = BTreeSet::new();
    for (path, item) in paths {
        for (method, operation) in item.methods() {
            let id = operation.operation_id.clone().expect("an operation has an id");
            assert!(operations.insert(id), "{path}: an id twice");
            assert!(!operation.responses(&spec).is_empty());
            let route = routes().iter().find(|route| route.path() == path && route.method().name() == method.as_str());
            assert!(route.is_some(), "{method} {path} is not served");
        }
    }
    assert_eq!(operations.len(), routes().len(), "each resource is described once");
}

/// Collects all references, and follows each.
fn references(value: &Value, document: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(reference)) = object.get("$ref") {
                let target = document.pointer(reference.strip_prefix('#').expect("a reference within the document"));
                assert!(target.is_some_and(Value::is_object), "{reference} leads nowhere");
                found.insert(reference.clone());
            }
            object.values().for_each(|value| references(value, document, found));
        }
        Value::Array(array) => array.iter().for_each(|value| references(value, document, found)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_is_used() {
    let document = openapi_document();
    let mut found = BTreeSet::new();
    references(&document, &document, &mut found);
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let responses = document["components"]["responses"].as_object().unwrap();
    let schema_names = schemas.keys().map(|name| format!("#/components/schemas/{name}"));
    let response_names = responses.keys().map(|name| format!("#/components/responses/{name}"));
    let defined: BTreeSet<String> = schema_names.chain(response_names).collect();
    assert_eq!(found, defined);
    for name in ["VmConfig", "NetConfig", "DiskConfig", "VmInfo", "DeviceReport", "StoryEvent", "Plugged"] {
        assert!(schemas.contains_key(name), "{name}");
    }
}

#[test]
fn schemas_say_what_the_types_say() {
    let document = openapi_document();
    let schemas = &document["components"]["schemas"];
    let net = &schemas["NetConfig"];
    assert!(net["properties"]["tap"].is_object() && net["properties"]["descriptors"].is_null());
    assert!(net.get("required").is_none(), "nothing of a card must be given");
    assert_eq!(schemas["FsConfig"]["required"], json!(["tag", "socket"]));
    assert_eq!(schemas["VmConfig"]["properties"]["disks"]["items"]["$ref"], "#/components/schemas/DiskConfig");
    let create = &document["paths"]["/api/v1/vm.create"]["put"];
    let body = &create["requestBody"]["content"]["application/json"]["schema"]["$ref"];
    assert_eq!(body, "#/components/schemas/VmConfig");
    assert_eq!(create["responses"]["409"]["content"]["application/json"]["schema"]["items"]["type"], "string");
}
