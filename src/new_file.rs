//! A file that has its name when it is complete and on the disk, and not before.
//!
//! It is written under another name in the same folder and renamed at the end, so a crash leaves what was there before. Whatever
//! fails or is interrupted removes the unfinished file; what a killed process left is taken over by the next writer, and a
//! lock keeps two from writing at a time. Not here: what is written.

use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Kind, Result};

/// Written before the disk is waited for: progress that is shown has been made, and the end is not a long wait.
const SYNC: usize = 64 << 20;

/// A file being written. Dropped without [`NewFile::finish`], it never was.
pub struct NewFile {
    file: BufWriter<File>,
    part: PathBuf,
    target: PathBuf,
    unsynced: usize,
    finished: bool,
}

impl NewFile {
    /// Begins the file that will be `target`, as `target` with `.part` at the end.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if the folder is missing; [`Kind::Other`] if it cannot be written to, or another process is writing
    /// the same file.
    pub fn create(target: &Path) -> Result<NewFile> {
        let mut part = target.as_os_str().to_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let failed = |e: &std::io::Error| Error::io(&part, e);
        let file = File::options().create(true).truncate(false).write(true).open(&part).map_err(|e| failed(&e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy(target)),
            // Some network file systems have no locks. Then nobody is kept out.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(failed(&e)),
        }
        // Its writer may have renamed it between opening and locking: this is then the finished file, which is left alone.
        if !same_file(&file, &part) {
            return Err(busy(target));
        }
        let file =
            NewFile { file: BufWriter::new(file), part, target: target.to_path_buf(), unsynced: 0, finished: false };
        file.file.get_ref().set_len(0).map_err(|e| Error::io(&file.part, &e))?;
        Ok(file)
    }

    /// Where it is being written, for messages.
    pub fn part(&self) -> &Path {
        &self.part
    }

    /// Waits until all is on the disk and gives the file its name, in place of what had it.
    ///
    /// # Errors
    /// [`Kind::Other`] if the disk is full or fails.
    pub fn finish(mut self) -> Result<()> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|e| Error::io(&self.part, &e))?;
        fs::rename(&self.part, &self.target).map_err(|e| Error::io(&self.target, &e))?;
        self.finished = true;
        sync_directory(&self.target)
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.unsynced = self.unsynced.saturating_add(n);
        if self.unsynced >= SYNC {
            self.unsynced = 0;
            self.file.flush()?;
            self.file.get_ref().sync_data()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.part);
        }
    }
}

fn busy(target: &Path) -> Error {
    let error = format!("{}: another process is writing it: try again when it is done", target.display());
    Error::new(Kind::Other, error)
}

/// Whether `file` is what now has the name `path`; `true` where the system does not tell.
pub(crate) fn same_file(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |meta: &fs::Metadata| (meta.dev(), meta.ino());
        matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

/// Makes the name of `file` as lasting as its contents.
pub(crate) fn sync_directory(file: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| Error::io(folder, &e))?;
    }
    let _ = file;
    Ok(())
}
