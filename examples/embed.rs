// libfastnorm from Rust, by its C interface:
//
//     rustc embed.rs -L <folder of the library> -C link-arg=-Wl,-rpath,<the same> && ./embed
use std::ffi::{c_char, c_double, c_int, c_void, CStr};
use std::ptr::null;

const FLOAT32: c_int = 1; // of fastnorm.h
const NHWC: c_int = 2;

#[link(name = "fastnorm")]
extern "C" {
    fn fastnorm_group_norm(
        dtype: c_int, layout: c_int, n: i64, channels: i64, spatial: i64, groups: i64,
        x: *const c_void, weight: *const c_void, bias: *const c_void, eps: c_double,
        y: *mut c_void, mean: *mut c_double, rstd: *mut c_double, options: *const c_void,
    ) -> c_int;
    fn fastnorm_status_string(status: c_int) -> *const c_char;
}

/// Group norm of (n, spatial, channels), or the library's reason why not.
fn group_norm(x: &[f32], n: usize, channels: usize, groups: usize) -> Result<Vec<f32>, String> {
    let spatial = x.len() / n / channels;
    assert_eq!(n * channels * spatial, x.len());
    let mut y = vec![0.0f32; x.len()];
    let (mut mean, mut rstd) = (vec![0.0; n * groups], vec![0.0; n * groups]);
    let status = unsafe {
        fastnorm_group_norm(
            FLOAT32, NHWC, n as i64, channels as i64, spatial as i64, groups as i64,
            x.as_ptr().cast(), null(), null(), 1e-5, y.as_mut_ptr().cast(), mean.as_mut_ptr(),
            rstd.as_mut_ptr(), null(),
        )
    };
    if status == 0 {
        return Ok(y);
    }
    Err(unsafe { CStr::from_ptr(fastnorm_status_string(status)) }.to_string_lossy().into_owned())
}

fn main() {
    let x: Vec<f32> = (0..2 * 16 * 100).map(|at| (at * 7919 % 1000) as f32 / 100.0).collect();
    let y = group_norm(&x, 2, 16, 4).expect("group norm");
    let square = y.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / y.len() as f64;
    println!("group norm: mean square {square:.4}");
    assert!((square - 1.0).abs() < 1e-3);
    let refused = group_norm(&x, 2, 16, 5).unwrap_err();
    println!("5 groups of 16 channels: {refused}");
    assert!(refused.contains("multiple"));
}
