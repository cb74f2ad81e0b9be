//! What became of each layer, for who asks.

use atoll_protocol::jail::{JailLayer, JailOutcome, JailedLayer};

/// The report of a jail while it closes.
#[derive(Debug, Default)]
pub(super) struct Ledger(Vec<JailedLayer>);

impl Ledger {
    /// Notes a layer; once for each.
    pub(super) fn note(&mut self, layer: JailLayer, outcome: JailOutcome) {
        tracing::debug!(%layer, %outcome, "jail");
        self.0.push(JailedLayer { layer, outcome });
    }

    pub(super) fn applied(&mut self, layer: JailLayer) {
        self.note(layer, JailOutcome::Applied);
    }

    pub(super) fn layers(&self) -> &[JailedLayer] {
        &self.0
    }

    /// The whole report.
    pub(super) fn close(self) -> Vec<JailedLayer> {
        let mut layers = self.0;
        layers.sort_unstable();
        layers
    }

    /// The first layer that is missing.
    pub(super) fn missing(&self) -> Option<JailedLayer> {
        self.0.iter().copied().find(|layer| !layer.stands())
    }
}
