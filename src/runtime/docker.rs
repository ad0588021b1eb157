//! Docker: name, labels and image of a container are in `DATA-ROOT/containers/ID/config.v2.json` (moby,
//! daemon/container/container.go); all else is in the state of runc.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::core::annotation::PREFIX;
use crate::core::container::{Container, Runtime};
use crate::runtime::{parse_json, read};

/// The namespace in containerd that Docker has for itself.
pub const NAMESPACE: &str = "moby";

/// Where Docker keeps its data, unless its configuration says otherwise.
const DATA_ROOT: &str = "/var/lib/docker";

/// The files in `/etc` that Docker makes for each container.
const OWN_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// What `config.v2.json` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Described {
    /// `/web` there, `web` here.
    pub name: Option<String>,
    /// Labels, those of the image with them.
    pub labels: BTreeMap<String, String>,
    /// The image's name as it was given, made whole: `docker.io/library/alpine:latest`. `None` where it was named by its
    /// id.
    pub image: Option<String>,
    /// Where the image's own configuration is, below the data root.
    pub image_file: Option<String>,
}

#[derive(Deserialize)]
struct File {
    #[serde(rename = "Name")]
    name: Option<String>,
    #[serde(rename = "Image")]
    image_id: Option<String>,
    #[serde(rename = "Driver")]
    driver: Option<String>,
    #[serde(rename = "Config")]
    config: Option<Config>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(rename = "Image")]
    image: Option<String>,
    #[serde(rename = "Labels")]
    labels: Option<BTreeMap<String, String>>,
}

/// Reads `config.v2.json`. Errors are in words.
pub fn parse(text: &str) -> Result<Described, String> {
    let file: File = parse_json(text)?;
    let name = file.name.map(|name| name.trim_start_matches('/').to_owned()).filter(|name| !name.is_empty());
    let (image, labels) = file.config.map(|config| (config.image, config.labels)).unwrap_or_default();
    let digest = file.image_id.as_deref().and_then(|id| id.strip_prefix("sha256:")).filter(|digest| is_hex(digest));
    let by_id = |image: &str| {
        let id = image.strip_prefix("sha256:").unwrap_or(image);
        is_hex(id) && digest.is_none_or(|digest| digest.starts_with(id))
    };
    let driver = file.driver.filter(|driver| driver.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    Ok(Described {
        name,
        labels: labels.unwrap_or_default(),
        image_file: driver.zip(digest).map(|(driver, id)| format!("image/{driver}/imagedb/content/sha256/{id}")),
        image: image.filter(|image| !image.is_empty() && !by_id(image)).map(|image| whole_name(&image)),
    })
}

/// Reads the labels of an image's configuration (image-spec, config.md). Errors are in words.
pub fn parse_image(text: &str) -> Result<BTreeMap<String, String>, String> {
    let image: Value = parse_json(text)?;
    let labels = image.pointer("/config/Labels").and_then(Value::as_object).into_iter().flatten();
    Ok(labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect())
}

/// As Docker completes it (distribution/reference, normalize.go).
fn whole_name(image: &str) -> String {
    let (registry, rest) = match image.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_owned()),
        Some(_) => ("docker.io", image.to_owned()),
        None => ("docker.io", format!("library/{image}")),
    };
    let tag = if rest.contains([':', '@']) { "" } else { ":latest" };
    format!("{registry}/{rest}{tag}")
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Completes what the runtime's `state` told: with what Docker knows of the container, as far as that can be read.
///
/// Of its labels, ours count as annotations do, if it was given them: what an image brings asks for nothing.
pub fn describe(container: &mut Container, state: &str) {
    container.runtime = Runtime::Docker;
    let root = data_root(&container.id, state).unwrap_or_else(|| DATA_ROOT.to_owned());
    let root = Path::new(&root);
    let described = read(&root.join("containers").join(&container.id).join("config.v2.json"));
    let described = match described.and_then(|text| parse(&text)) {
        Ok(described) => described,
        Err(reason) => return tracing::debug!(container = container.id, "its name is not known: {reason}"),
    };
    add(container, described, |file| parse_image(&read(&root.join(file))?));
}

/// Adds what Docker knows; `labels_of` reads the file of the container's image.
pub fn add(
    container: &mut Container,
    described: Described,
    labels_of: impl FnOnce(&str) -> Result<BTreeMap<String, String>, String>,
) {
    container.runtime = Runtime::Docker;
    (container.name, container.image) = (described.name, described.image);
    let mut ours = described.labels.into_iter().filter(|(key, _)| key.starts_with(PREFIX)).peekable();
    if ours.peek().is_none() {
        return;
    }
    let of_image = described.image_file.ok_or("where its image's labels are is not known".to_owned());
    match of_image.and_then(|file| labels_of(&file)) {
        Ok(of_image) => {
            for (key, value) in ours.filter(|(key, value)| of_image.get(key) != Some(value)) {
                container.annotations.entry(key).or_insert(value);
            }
        }
        Err(reason) => tracing::debug!(container = container.label(), "labels ignored: {reason}"),
    }
}

/// Docker's data root, from the files that Docker makes for each container and mounts into it. `state` is runc's
/// `state.json`, or the specification.
pub fn data_root(id: &str, state: &str) -> Option<String> {
    let state: Value = serde_json::from_str(state).ok()?;
    let mounts = ["/config/mounts", "/mounts"].into_iter().find_map(|pointer| state.pointer(pointer)?.as_array())?;
    mounts.iter().find_map(|mount| {
        let (destination, source) = (mount.get("destination")?.as_str()?, mount.get("source")?.as_str()?);
        let name = destination.strip_prefix("/etc/").filter(|name| OWN_FILES.contains(name))?;
        source.strip_suffix(&format!("/containers/{id}/{name}")).map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_whole() {
        for (given, whole) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3", "docker.io/library/alpine:3"),
            ("me/web@sha256:ab", "docker.io/me/web@sha256:ab"),
            ("ghcr.io/me/web", "ghcr.io/me/web:latest"),
            ("localhost:5000/web:1", "localhost:5000/web:1"),
            ("localhost/web", "localhost/web:latest"),
        ] {
            assert_eq!(whole_name(given), whole);
        }
        let image = |image: &str| {
            parse(&format!(r#"{{"Image":"sha256:9f3cab01","Config":{{"Image":"{image}"}}}}"#)).unwrap().image
        };
        assert_eq!(image("9f3cab"), None, "by its id");
        assert_eq!(image("sha256:9f3cab01"), None);
        assert_eq!(image("beef"), Some("docker.io/library/beef:latest".into()), "not this one's id");
    }

    #[test]
    fn only_where_docker_has_its_own_files_its_data_are() {
        let state = |destination: &str, source: &str| {
            format!(r#"{{"config":{{"mounts":[{{}},{{"destination":"{destination}","source":"{source}"}}]}}}}"#)
        };
        let root = |destination: &str, source: &str| data_root("a1", &state(destination, source));
        assert_eq!(root("/etc/hosts", "/srv/docker/containers/a1/hosts").as_deref(), Some("/srv/docker"));
        assert_eq!(root("/etc/hosts", "/srv/docker/containers/b2/hosts"), None);
        assert_eq!(root("/data", "/srv/docker/containers/a1/hosts"), None);
        assert_eq!(data_root("a1", "{}"), None);
        let spec = r#"{"mounts":[{"destination":"/etc/hostname","source":"/x/containers/a1/hostname"}]}"#;
        assert_eq!(data_root("a1", spec).as_deref(), Some("/x"), "crun's");
    }

    #[test]
    fn labels_count_where_the_image_does_not_bring_them() {
        let key = |name: &str| format!("{PREFIX}device.{name}");
        let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| (key(name), (*value).to_owned())).collect()
        };
        let asked = |of_image: Result<BTreeMap<String, String>, String>| {
            let mut container = crate::runtime::crun::parse("a1", r#"{"pid":1,"process-start-time":1}"#, "{}").unwrap();
            container.annotations = pairs(&[("video", "false")]);
            let labels = pairs(&[("video", "true"), ("ttyUSB", "true"), ("audio", "1")]);
            let described = Described { labels, image_file: Some("x".into()), ..Described::default() };
            add(&mut container, described, |_| of_image);
            container.annotations
        };
        assert_eq!(asked(Ok(pairs(&[]))), pairs(&[("video", "false"), ("ttyUSB", "true"), ("audio", "1")]));
        let given = pairs(&[("video", "false"), ("audio", "1")]);
        assert_eq!(asked(Ok(pairs(&[("ttyUSB", "true"), ("audio", "true")]))), given, "one the image brings");
        assert_eq!(asked(Err("not there".into())), pairs(&[("video", "false")]));
    }
}
