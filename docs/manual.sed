# The comments of fastnorm.h as Doxygen reads them: blocks between double lines describe the file,
# what follows code on its line describes that, and any other what it stands above.
/^\/\* ----/b
s|^/\* ====*$|/** \\file|
s|^ \* ====* \*/$| */|
s|^\( *\)/\* |\1/** |
s|^\( *[^ /*].*[^ ]\)  */\* |\1 /**< |
