//! The end of a layer.

use crossbeam::channel::{self, RecvTimeoutError};

use super::CopyError;
use crate::cancel::Cancel;
use crate::layer::LayerWriter;

/// Has the layer written to the end, and on stable storage. What is still in the writer's hands may
/// take a slow disk minutes; a stop does not wait for it, and the layer is then unusable.
///
/// # Errors
/// [`CopyError::Layer`] for what the layer says, [`CopyError::Thread`].
pub fn finish(layer: &dyn LayerWriter, cancel: &Cancel) -> Result<(), CopyError> {
    let (finishing, finished) = channel::bounded::<()>(0);
    let watch = move || {
        while finished.recv_timeout(Cancel::POLL) == Err(RecvTimeoutError::Timeout) {
            if cancel.is_set() {
                layer.abort();
            }
        }
    };
    std::thread::scope(|scope| {
        // Owned here, so that a panic ends the watch, too.
        let _finishing = finishing;
        let watcher = std::thread::Builder::new().name("finish".into());
        watcher.spawn_scoped(scope, watch).map_err(CopyError::Thread)?;
        Ok(layer.finish()?)
    })
}
