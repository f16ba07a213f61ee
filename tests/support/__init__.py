"""What the tests share: real classes at tiny sizes, a Hub in memory, and comparisons."""
