"""What requests may say: kinds, records, and the document made of them."""
