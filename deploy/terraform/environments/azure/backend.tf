# terraform init -backend-config=resource_group_name=... -backend-config=storage_account_name=...
terraform {
  backend "azurerm" {
    container_name   = "tfstate"
    key              = "neuroloop-azure.tfstate"
    use_azuread_auth = true
  }
}
