//! As much of llama-bench as `gemrun bench --vs` asks for, over the llama.cpp in the crate llama-cpp-sys-2.
//!
//! The one idea: what is measured is llama.cpp, as its own llama-bench sets it up: the same batch sizes, a pool of threads
//! that live as long as the context, random tokens, logits of a prompt's last token only, one warm-up run. It takes one value
//! for each option, `-o json` only, and one test at a time; anything else is refused.
//!
//! unsafe, because the crate is llama.cpp's C interface as it is.

use std::ffi::CString;
use std::process::ExitCode;
use std::time::Instant;

use llama_cpp_sys_2 as llama;

/// What llama-bench uses unless told otherwise: tokens of a prompt given to llama.cpp at once, and computed at once.
const BATCH: usize = 2048;
const PART: usize = 512;

/// The command line.
struct Options {
    model: String,
    prompt: usize,
    generate: usize,
    depth: usize,
    threads: usize,
    repetitions: usize,
    flash_attention: bool,
    key: String,
    value: String,
    repack: bool,
    warm_up: bool,
}

impl Options {
    fn read(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            model: String::new(),
            prompt: 0,
            generate: 0,
            depth: 0,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            repetitions: 5,
            flash_attention: true,
            key: "f16".to_string(),
            value: "f16".to_string(),
            repack: true,
            warm_up: true,
        };
        while let Some(option) = arguments.next() {
            if option == "--no-warmup" {
                options.warm_up = false;
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("{option}: expected a value"))?;
            let number = || {
                value
                    .parse::<usize>()
                    .ok()
                    .filter(|n| *n <= 1 << 20)
                    .ok_or(format!("{option}: {value}: expected a number"))
            };
            let switch = || match &value[..] {
                "0" => Ok(false),
                "1" => Ok(true),
                _ => Err(format!("{option}: {value}: expected 0 or 1")),
            };
            match &option[..] {
                "-m" => options.model = value,
                "-p" => options.prompt = number()?,
                "-n" => options.generate = number()?,
                "-d" => options.depth = number()?,
                "-t" => options.threads = number()?.max(1),
                "-r" => options.repetitions = number()?.max(1),
                "-fa" => options.flash_attention = switch()?,
                "-ctk" => options.key = value,
                "-ctv" => options.value = value,
                "--repack" => options.repack = switch()?,
                "-o" if value == "json" => {}
                "-o" => return Err(format!("-o {value}: expected json")),
                _ => return Err(format!("{option}: no such option here")),
            }
        }
        match (options.prompt, options.generate) {
            _ if options.model.is_empty() => Err("expected -m FILE".to_string()),
            (0, 0) => Err("expected -p N or -n N above 0".to_string()),
            (1.., 1..) => Err("expected one test: -p N -n 0 or -p 0 -n N".to_string()),
            _ => Ok(options),
        }
    }
}

fn cache_type(name: &str) -> Result<llama::ggml_type, String> {
    match name {
        "f32" => Ok(llama::GGML_TYPE_F32),
        "f16" => Ok(llama::GGML_TYPE_F16),
        "bf16" => Ok(llama::GGML_TYPE_BF16),
        "q8_0" => Ok(llama::GGML_TYPE_Q8_0),
        _ => Err(format!("cache type {name}: expected f32, f16, bf16 or q8_0")),
    }
}

/// A loaded model with room for one test, freed in the order llama.cpp asks for.
struct Session {
    model: *mut llama::llama_model,
    context: *mut llama::llama_context,
    pool: *mut llama::ggml_threadpool,
    vocab: usize,
    /// State of the generator of random tokens.
    random: u64,
}

impl Session {
    fn open(options: &Options) -> Result<Session, String> {
        let path = CString::new(&options.model[..]).map_err(|_| "a zero byte in the model's name".to_string())?;
        let (key, value) = (cache_type(&options.key)?, cache_type(&options.value)?);
        let mut session = Session {
            model: std::ptr::null_mut(),
            context: std::ptr::null_mut(),
            pool: std::ptr::null_mut(),
            vocab: 0,
            random: 1,
        };
        // SAFETY: the calls and their order are those of llama.cpp's documentation; every pointer that comes back is checked
        // before it is used, and `session` frees what there is of them if a later one fails.
        unsafe {
            llama::llama_log_set(Some(silent), std::ptr::null_mut());
            llama::llama_backend_init();
            let mut settings = llama::llama_model_default_params();
            settings.use_extra_bufts = options.repack;
            session.model = llama::llama_model_load_from_file(path.as_ptr(), settings);
            if session.model.is_null() {
                return Err(format!("{}: llama.cpp does not load it", options.model));
            }
            let vocab = llama::llama_vocab_n_tokens(llama::llama_model_get_vocab(session.model));
            session.vocab = usize::try_from(vocab).ok().filter(|n| *n > 0).ok_or("no vocabulary")?;

            let mut settings = llama::llama_context_default_params();
            settings.n_ctx = (options.prompt + options.generate + options.depth) as u32;
            settings.n_batch = BATCH as u32;
            settings.n_ubatch = PART as u32;
            settings.type_k = key;
            settings.type_v = value;
            settings.flash_attn_type = match options.flash_attention {
                true => llama::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                false => llama::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            };
            settings.swa_full = false;
            session.context = llama::llama_init_from_model(session.model, settings);
            if session.context.is_null() {
                return Err("llama.cpp makes no context".to_string());
            }
            let threads = options.threads as i32;
            let mut pool = llama::ggml_threadpool_params_default(threads);
            session.pool = llama::ggml_threadpool_new(&mut pool);
            if session.pool.is_null() {
                return Err(format!("no pool of {threads} threads"));
            }
            llama::llama_attach_threadpool(session.context, session.pool, std::ptr::null_mut());
            llama::llama_set_n_threads(session.context, threads, threads);
        }
        Ok(session)
    }

    fn token(&mut self) -> llama::llama_token {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.random >> 33) as usize % self.vocab) as llama::llama_token
    }

    /// Empties the cache.
    fn clear(&mut self) {
        // SAFETY: the context is not null.
        unsafe { llama::llama_memory_clear(llama::llama_get_memory(self.context), false) }
    }

    /// Runs `tokens` random tokens, `at_once` of them in a call.
    fn run(&mut self, tokens: usize, at_once: usize) -> Result<(), String> {
        let mut left = tokens;
        while left > 0 {
            let mut batch: Vec<llama::llama_token> = (0..left.min(at_once)).map(|_| self.token()).collect();
            // SAFETY: the batch points to `batch`, which outlives the call; its positions follow those in the cache, and
            // logits are wanted of its last token.
            let status = unsafe {
                let status = llama::llama_decode(
                    self.context,
                    llama::llama_batch_get_one(batch.as_mut_ptr(), batch.len() as i32),
                );
                llama::llama_synchronize(self.context);
                status
            };
            if status != 0 {
                return Err(format!("llama_decode: status {status}"));
            }
            left -= batch.len();
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: each was made by llama.cpp and is freed once; llama.cpp ignores null, but for the pool.
        unsafe {
            llama::llama_free(self.context);
            if !self.pool.is_null() {
                llama::ggml_threadpool_free(self.pool);
            }
            llama::llama_model_free(self.model);
            llama::llama_backend_free();
        }
    }
}

/// Takes llama.cpp's messages.
extern "C" fn silent(_: llama::ggml_log_level, _: *const std::ffi::c_char, _: *mut std::ffi::c_void) {}

/// Nanoseconds of each repetition.
fn measure(options: &Options) -> Result<Vec<u128>, String> {
    let mut session = Session::open(options)?;
    if options.warm_up {
        session.run(options.prompt, BATCH)?;
        session.run(options.generate.min(1), 1)?;
    }
    let mut times = Vec::new();
    for _ in 0..options.repetitions {
        session.clear();
        session.run(options.depth, BATCH)?;
        let start = Instant::now();
        session.run(options.prompt, BATCH)?;
        session.run(options.generate, 1)?;
        times.push(start.elapsed().as_nanos());
    }
    Ok(times)
}

/// The result, with llama-bench's names.
fn json(options: &Options, times: &[u128]) -> String {
    let tokens = (options.prompt + options.generate) as f64;
    let speeds: Vec<f64> = times.iter().map(|time| tokens * 1e9 / *time as f64).collect();
    let n = speeds.len() as f64;
    let average = speeds.iter().sum::<f64>() / n;
    let squares: f64 = speeds.iter().map(|speed| (speed - average).powi(2)).sum();
    let deviation = if n < 2.0 { 0.0 } else { (squares / (n - 1.0)).sqrt() };
    let samples: Vec<String> = speeds.iter().map(|speed| format!("{speed:.6}")).collect();
    format!(
        "[\n  {{\n    \"build_commit\": \"llama-cpp-sys-2 {}\",\n    \"n_batch\": {BATCH},\n    \"n_ubatch\": {PART},\n    \
         \"n_threads\": {},\n    \"flash_attn\": {},\n    \"repack\": {},\n    \"n_prompt\": {},\n    \"n_gen\": {},\n    \
         \"n_depth\": {},\n    \"avg_ts\": {average:.6},\n    \"stddev_ts\": {deviation:.6},\n    \"samples_ts\": [ {} ]\n  }}\n]",
        version(),
        options.threads,
        u8::from(options.flash_attention),
        options.repack,
        options.prompt,
        options.generate,
        options.depth,
        samples.join(", ")
    )
}

/// The crate's version, from the lock file.
fn version() -> &'static str {
    let entry = include_str!("../Cargo.lock").split("name = \"llama-cpp-sys-2\"\nversion = \"").nth(1);
    entry.and_then(|entry| entry.split('"').next()).unwrap_or("unknown")
}

fn main() -> ExitCode {
    let result = Options::read(std::env::args().skip(1)).and_then(|options| Ok(json(&options, &measure(&options)?)));
    match result {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
