resource "azurerm_storage_account" "store" {
  name                            = "${var.unique}neuroloop"
  resource_group_name             = azurerm_resource_group.main.name
  location                        = azurerm_resource_group.main.location
  account_tier                    = "Standard"
  account_replication_type        = "ZRS"
  min_tls_version                 = "TLS1_2"
  https_traffic_only_enabled      = true
  allow_nested_items_to_be_public = false
  shared_access_key_enabled       = false # identities only
  default_to_oauth_authentication = true
  blob_properties {
    versioning_enabled = true
    # What was overwritten or erased is gone for good after a week: an erasure must not live on in old versions.
    delete_retention_policy {
      days = 7
    }
  }
}

resource "azurerm_storage_management_policy" "store" {
  storage_account_id = azurerm_storage_account.store.id
  rule {
    name    = "old-versions"
    enabled = true
    filters {
      blob_types = ["blockBlob"]
    }
    actions {
      version {
        delete_after_days_since_creation = 7
      }
    }
  }
  rule {
    name    = "old-backups"
    enabled = true
    filters {
      blob_types   = ["blockBlob"]
      prefix_match = ["${azurerm_storage_container.backups.name}/"]
    }
    actions {
      base_blob {
        delete_after_days_since_creation_greater_than = var.backup_days
      }
    }
  }
}

resource "azurerm_storage_container" "store" {
  name                  = "neuroloop"
  storage_account_id    = azurerm_storage_account.store.id
  container_access_type = "private"
}

# The nightly backups, written by the identity `backup` alone.
resource "azurerm_storage_container" "backups" {
  name                  = "backups"
  storage_account_id    = azurerm_storage_account.store.id
  container_access_type = "private"
}

resource "azurerm_role_assignment" "backups" {
  scope                = azurerm_storage_container.backups.id
  role_definition_name = "Storage Blob Data Contributor"
  principal_id         = azurerm_user_assigned_identity.part["backup"].principal_id
  principal_type       = "ServicePrincipal"
}

resource "azurerm_management_lock" "store" {
  count      = var.protected ? 1 : 0
  name       = "keep"
  scope      = azurerm_storage_account.store.id
  lock_level = "CanNotDelete"
  notes      = "Predictions, corrections, models and data versions."
}

resource "azurerm_container_registry" "images" {
  name                = "${var.unique}neuroloop"
  resource_group_name = azurerm_resource_group.main.name
  location            = azurerm_resource_group.main.location
  sku                 = "Standard"
  admin_enabled       = false
}

resource "azurerm_role_assignment" "pull" {
  scope                = azurerm_container_registry.images.id
  role_definition_name = "AcrPull"
  principal_id         = azurerm_kubernetes_cluster.main.kubelet_identity[0].object_id
}
