//! Which images are open, written down for the next start in the file `images`, and that start.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::engine::Group;
use super::image::Image;
use super::{GroupError, Point};
use crate::events::Severity;
use crate::units::{LogTime, Name, Position};

/// An image as it survives a restart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct KeptImage {
    /// Its name.
    pub name: Name,
    /// Who opened it.
    pub owner: String,
    /// Where it is.
    pub position: Position,
    /// When it was opened.
    pub opened: LogTime,
    /// When it is closed by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<LogTime>,
    /// The branch that it shows; else it shows the group's own past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

impl Group {
    /// Closes the images whose time is over.
    pub(super) fn close_expired(&self) {
        self.end_idle_shipments();
        let now = self.context.env.clock.wall();
        let over = |image: &Arc<Image>| image.expires().is_some_and(|expires| expires <= now);
        for image in self.images().into_iter().filter(over) {
            if self.close_this_image(&image).is_ok() {
                let text = format!("image {} of {} has expired", image.name(), image.owner());
                self.emit(Severity::Info, "image-expired", text, json!({"image": image.name()}));
            }
        }
    }

    /// Writes down which images are open, for the next start. A group that was closed has given
    /// them up, and its file stays as it is.
    pub(super) fn keep_images(&self) -> Result<(), GroupError> {
        let _one_at_a_time = self.images_file.lock().expect("no holder panics");
        let images = {
            let core = self.lock();
            if core.closed {
                return Err(self.refused("is closed"));
            }
            core.images.clone()
        };
        let kept: Vec<KeptImage> = images
            .values()
            .filter(|image| image.broken().is_none())
            .map(|image| image.kept())
            .collect();
        let disk = &self.context.env.disk;
        let path = self.dir.join("images");
        let text = serde_json::to_vec(&kept).expect("plain data becomes JSON");
        super::files::store(&**disk, &path, &text).map_err(|cause| self.io("write images", &cause))
    }

    /// [`Group::keep_images`] after something that cannot be undone: a failure is only logged, for
    /// an image too many that the next start opens harms nobody.
    pub(super) fn try_keep_images(&self) {
        if let Err(error) = self.keep_images() {
            tracing::warn!("{error}");
        }
    }

    /// Opens the images that were open when the node stopped.
    pub(super) fn reopen_images(&self) {
        let path = self.dir.join("images");
        let kept: Vec<KeptImage> = match super::files::load(&*self.context.env.disk, &path)
            .and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from))
        {
            Ok(kept) => kept,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(cause) => {
                let text = format!("no image could be opened again: {}: {cause}", path.display());
                return self.emit(Severity::Warning, "image-lost", text, json!(null));
            }
        };
        let mut lost = false;
        self.lock().images_known = true;
        for image in kept {
            let name = image.name.clone();
            if let Err(error) = self.reopen_image(image) {
                let text = format!("image {name} could not be opened again: {error}");
                self.emit(Severity::Warning, "image-lost", text, json!({"image": name}));
                lost = true;
            }
        }
        // What was told to be lost stays lost.
        if lost {
            self.try_keep_images();
        }
    }

    fn reopen_image(&self, image: KeptImage) -> Result<(), GroupError> {
        if image.branch.is_some() {
            return self.build_image(image, None).map(|_| ());
        }
        // A cut may have taken its moment away, and other records may have grown over the place.
        let (was, found) = (image.position, self.resolve(&Point::Lsn(image.position.lsn))?);
        if (found.epoch, found.lsn) != (was.epoch, was.lsn) {
            return Err(self.refused(format!("LSN {} of its epoch left the history", was.lsn)));
        }
        self.build_image(image, None).map(|_| ())
    }
}
