//! containerd without Docker: its containers' ids are unique in a namespace, and they run by runc or crun.

use crate::core::container::{Container, Runtime, short_id};

/// nerdctl's annotation (nerdctl/pkg/labels).
const NERDCTL_NAME: &str = "nerdctl/name";
/// The namespace of its containers (containerd, internal/cri/constants).
const KUBERNETES: &str = "k8s.io";

/// Completes what the runtime's state told of a container in that namespace.
pub fn describe(container: &mut Container, namespace: &str) {
    container.runtime = Runtime::Containerd;
    let is_long = short_id(&container.id) != container.id;
    // In Kubernetes, annotations are the pod's own.
    container.name = match container.annotations.get(NERDCTL_NAME).filter(|_| namespace != KUBERNETES) {
        Some(name) => Some(name.clone()),
        None if is_long => None,
        None => Some(container.id.clone()),
    };
    if !is_long {
        container.id = format!("containerd:{namespace}/{}", container.id);
    }
}
