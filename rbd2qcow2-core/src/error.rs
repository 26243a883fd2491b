//! Errors as text.

use std::error::Error;
use std::fmt;

use crate::files::Shortage;

/// Shows an error and all its causes on one line, outermost first, joined by `: `.
///
/// An error's own text does not repeat its cause: where nobody will ask for the source any more, in
/// the log for instance, what the system said would be lost without this. Where too many files were open, what
/// to do about that comes last.
#[derive(Clone, Copy, Debug)]
pub struct Causes<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Shortage::untold(self.0).map_or(Ok(()), |shortage| write!(f, ": {shortage}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::ChainError;
    use std::path::Path;

    #[test]
    fn no_cause_is_lost() {
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let text = denied.to_string();
        let error = ChainError::io("remove", Path::new("/b/vm/x"))(denied);
        assert_eq!(Causes(&error).to_string(), format!("cannot remove /b/vm/x: {text}"));
    }
}
