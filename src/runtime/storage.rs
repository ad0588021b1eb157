//! containers/storage, which podman keeps its containers in: their names and the names of their images.

use std::fs;

use serde::Deserialize;

/// What is known of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub name: Option<String>,
    /// The name of its image, `docker.io/library/alpine:latest`.
    pub image: Option<String>,
}

/// One entry of `containers.json` (containers/storage, `Container`).
#[derive(Deserialize)]
struct Entry {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    /// A JSON text of podman's (`RuntimeContainerMetadata`).
    #[serde(default)]
    metadata: Option<String>,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(rename = "image-name")]
    image: Option<String>,
}

/// Looks the container up in the files beside the containers' directories. `directories` are places in which its own
/// directory may be.
pub fn look_up(id: &str, directories: &[String]) -> Option<Stored> {
    let files = directories.iter().flat_map(|place| {
        ["containers.json", "volatile-containers.json"].map(|file| format!("{}/{file}", place.trim_end_matches('/')))
    });
    files.filter_map(|path| fs::read_to_string(path).ok()).find_map(|text| parse(&text, id))
}

fn parse(text: &str, id: &str) -> Option<Stored> {
    let all: Vec<Entry> = serde_json::from_str(text).ok()?;
    let one = all.into_iter().find(|one| one.id == id)?;
    let metadata = one.metadata.and_then(|text| serde_json::from_str::<Metadata>(&text).ok());
    let image = metadata.and_then(|metadata| metadata.image).filter(|image| !image.is_empty());
    Some(Stored { name: one.names.and_then(|names| names.into_iter().next()), image })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_image_are_read() {
        let text = r#"[{"id":"a1","names":["web"],"image":"9f","metadata":"{\"image-name\":\"docker.io/library/alpine:3\",\"name\":\"web\"}"},{"id":"b2","metadata":"x"}]"#;
        let stored = |name: Option<&str>, image: Option<&str>| {
            Some(Stored { name: name.map(Into::into), image: image.map(Into::into) })
        };
        assert_eq!(parse(text, "a1"), stored(Some("web"), Some("docker.io/library/alpine:3")));
        assert_eq!(parse(text, "b2"), stored(None, None));
        assert_eq!(parse(text, "c3"), None);
        assert_eq!(parse("{}", "a1"), None);
    }
}
