"""What is done to data sets before a training: check, download, convert, write layouts."""
