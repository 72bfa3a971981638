//! A file that keeps other processes out of a folder while it is held.

#![forbid(unsafe_code)]

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

/// The right to change what the file stands for. It ends with this value or with the process, however that ends.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Makes the file at `path`, if it is not there, and locks it; `None` if another process has.
    ///
    /// # Errors
    /// [`crate::Kind::NotFound`] if the folder is missing, others if the file cannot be made or locked.
    pub fn try_take(path: &Path) -> Result<Option<Lock>> {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(|e| Error::io(path, &e))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            // Some network file systems have no locks. Then nobody is kept out.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(Some(Lock(file))),
            Err(TryLockError::Error(e)) => Err(Error::io(path, &e)),
        }
    }

    /// The file that was locked, which may have lost its name meanwhile.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Lock {
    /// Closing is not enough: a process that is being started just now has the file open, too, until it is another program.
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_whoever_else_has_the_file_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = Lock::try_take(&path).unwrap().unwrap();
        assert!(Lock::try_take(&path).unwrap().is_none());
        // What a started process has, for a moment.
        let _inherited = first.0.try_clone().unwrap();
        drop(first);
        assert!(Lock::try_take(&path).unwrap().is_some());
        assert!(Lock::try_take(&folder.path().join("missing/lock")).is_err());
    }
}
