"""Small tools that any part may use and that know nothing of chat. They import nothing of chatcore but errors."""
